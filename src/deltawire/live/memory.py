"""Live parameters as flat integers: read, gather and write bits where they lie, in host memory or on an accelerator."""

import numpy as np
import torch

from deltawire.errors import DtypeMismatch
from deltawire.live.accelerator import Accelerator
from deltawire.live.arena import most_in
from deltawire.live.boxes import LiveBox
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.device import sweeps
from deltawire.weights.device.carriers import CARRIERS


class Memory:
    """The whole storage behind one live tensor, as a flat vector of integers as wide as its dtype.

    Bits come out and go in on the host. Where live elements are wider than the checkpoint's, `shift` zero bits were
    added at the low end; where they are narrower (a `shift` below 0), taken off. Writing goes through the storage
    itself and never rebinds it: captured CUDA graphs hold its address. `accelerator` is None for the host's memory.
    """

    def __init__(self, tensor: torch.Tensor, shift: int = 0, accelerator: Accelerator | None = None) -> None:
        self.flat = flat_of(tensor)
        self.shift, self.accelerator = shift, accelerator
        self._live = np.dtype(f"<u{tensor.element_size()}")
        self._host = self.flat.numpy().view(self._live) if accelerator is None else None
        self._shipped = np.dtype(f"<u{tensor.element_size() - shift // 8}")

    @property
    def address(self) -> int:
        """Where the storage begins."""
        return self.flat.data_ptr()

    def like(self, other: torch.Tensor) -> "Memory":
        """Another tensor's storage, seen the same way."""
        return Memory(other, self.shift, self.accelerator)

    def pieces(self, box: LiveBox) -> list[LiveBox]:
        """A box in pieces that can each cross at once, in row-major order; on the host the box itself."""
        if self.accelerator is None:
            return [box]
        return list(box.pieces(most_in(self.accelerator.arena.window_bytes, self.flat.dtype)))

    def lying(self, box: LiveBox) -> UInts:
        """A box's bits on the host as they lie there, in row-major order; perhaps live memory itself, to look at
        now."""
        if (accelerator := self.accelerator) is None:
            return to_host(self.view(box))
        found, start = accelerator.pinned(box.size, self.flat.dtype), 0
        with accelerator.beside():
            for piece in self.pieces(box):
                view, end = self.view(piece), start + piece.size
                if not view.is_contiguous():
                    across = accelerator.arena.window().take(piece.size, self.flat.dtype)
                    across.view(piece.shape).copy_(view)
                    view = across
                found[start:end].copy_(view.view(-1), non_blocking=True)
                start = end
        return found.numpy().view(self._live)

    def read(self, box: LiveBox) -> UInts:
        """A box's bits as the checkpoint has them, on the host in row-major order; perhaps live memory itself."""
        return self.as_checkpoint(self.lying(box))

    def put(self, box: LiveBox, bits: torch.Tensor) -> None:
        """Write a box's bits, as they lie there: a flat carrier on the host, in row-major order."""
        view = self.view(box)
        if (accelerator := self.accelerator) is None or view.is_contiguous():
            view.copy_(bits.view(box.shape), non_blocking=True)
            return
        with accelerator.crossing() as window:
            across = window.take(box.size, self.flat.dtype)
            across.copy_(bits, non_blocking=True)
            view.copy_(across.view(box.shape))

    def gather(self, offsets: Positions) -> UInts:
        """The bits at these offsets, as they lie there, on the host."""
        if self._host is not None:
            from deltawire.weights import kernels

            return kernels.gather(self._host, offsets)
        accelerator = self.accelerator
        assert accelerator is not None
        most, kind = most_in(accelerator.arena.window_bytes, torch.int64, self.flat.dtype), self.flat.dtype
        wanted, found = torch.from_numpy(offsets), accelerator.pinned(offsets.size, kind)
        with accelerator.beside():
            for start in range(0, offsets.size, most):
                own, part = wanted[start : start + most], accelerator.arena.window()
                places, bits = part.take(own.numel(), torch.int64), part.take(own.numel(), kind)
                places.copy_(own)
                sweeps.gather([self.flat], [own.numel()], places, out=bits)
                found[start : start + most].copy_(bits, non_blocking=True)
        return found.numpy().view(self._live)

    def scatter(self, offsets: Positions, bits: UInts) -> None:
        """Write bits, as they lie there, to these offsets of host memory."""
        from deltawire.weights import kernels

        assert self._host is not None
        kernels.scatter(self._host, offsets, bits)

    def kept(self, bits: UInts) -> torch.Tensor:
        """Bits for `put`, in host memory from where they cross fast."""
        carried = torch.from_numpy(bits).view(self.flat.dtype)
        return carried if self.accelerator is None else self.accelerator.pinned(bits.size, carried.dtype).copy_(carried)

    def owned(self, there: UInts) -> torch.Tensor:
        """What `lying` gave, for `put`, in memory that no write changes."""
        carried = torch.from_numpy(there).view(self.flat.dtype)
        return carried.clone() if self.accelerator is None else carried

    def differing(self, there: UInts, bits: UInts) -> Positions:
        """Numbers of the elements that are not these, in every bit of the live dtype; `there` is what lies there."""
        if self.shift < 0:
            return np.flatnonzero(self.as_checkpoint(there) != bits)
        return np.flatnonzero(there != self._widened(bits))

    def view(self, box: LiveBox) -> torch.Tensor:
        """A box of the storage, writable, with its bits as they lie there."""
        return self.flat.as_strided(box.shape, box.target_strides, box.target_offset)

    def as_live(self, bits: UInts) -> UInts:
        """The checkpoint's bits as they are to lie here. Raises DtypeMismatch for values that need more bits than live
        ones have."""
        if self.shift >= 0:
            return np.ascontiguousarray(self._widened(bits))
        if lost := int(np.count_nonzero(bits & ((1 << -self.shift) - 1))):
            raise DtypeMismatch(
                f"{lost} values need more than the {8 * self._live.itemsize} bits that the server holds; publish it "
                'rounded to those, by Publisher(dtype={"NAME": "BF16"})'
            )
        return (bits >> -self.shift).astype(self._live)

    def as_checkpoint(self, bits: UInts) -> UInts:
        """Bits that lie here as the checkpoint has them. A value that its dtype cannot hold comes out wrong by its
        highest exponent bit, so that no digest takes it for the one it nearly is."""
        if not self.shift:
            return bits
        if self.shift < 0:
            return _shifted(bits.astype(self._shipped), -self.shift)
        narrow: UInts = (bits >> self.shift).astype(self._shipped)
        foreign = (bits & ((1 << self.shift) - 1)) != 0
        narrow[foreign] ^= narrow.dtype.type(1 << (8 * narrow.itemsize - 2))
        return narrow

    def _widened(self, bits: UInts) -> UInts:
        return _shifted(bits.astype(self._live), self.shift) if self.shift else bits


def flat_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage behind a tensor as a flat carrier; shares its memory."""
    storage, width = tensor.untyped_storage(), tensor.element_size()
    whole = torch.empty(0, dtype=CARRIERS[width], device=tensor.device)
    return whole.set_(storage, 0, (storage.nbytes() // width,), (1,))


def carrier_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as a flat carrier, in row-major order; shares the memory of a contiguous one."""
    return tensor.detach().contiguous().reshape(-1).view(CARRIERS[tensor.element_size()])


def to_host(view: torch.Tensor) -> UInts:
    """A view's bits as a flat array on the host, in row-major order."""
    bits: UInts = carrier_of(view).cpu().numpy().view(np.dtype(f"<u{view.element_size()}"))
    return bits


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(carrier_of(one), carrier_of(other))


def _shifted(bits: UInts, by: int) -> UInts:
    """Bits moved towards the high end."""
    return np.left_shift(bits, by, dtype=bits.dtype)
