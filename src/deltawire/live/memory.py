"""Live parameters as flat integers: gather, scatter and digest bits where they lie, on whichever device they are."""

from collections.abc import Iterator

import numpy as np
import torch

from deltawire.errors import DtypeMismatch
from deltawire.live.boxes import LiveBox
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.digest import MODULUS, digest_at, digest_bits

CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""the integer dtype that carries bits through torch, by width in bytes"""
SHORT = 16
"""elements that lie in a row, below which positions are computed for each"""
CHUNK = 1 << 24
"""elements copied from an accelerator at a time for a digest"""


class Memory:
    """The whole storage behind one live tensor, as a flat vector of integers as wide as its dtype.

    Bits go in and out as the checkpoint has them. Where live elements are wider, `shift` zero bits are added at the low
    end or taken off; where they are narrower (a `shift` below 0), the other way. Writing goes through the storage
    itself and never rebinds it: captured CUDA graphs hold its address.
    """

    def __init__(self, tensor: torch.Tensor, shift: int = 0) -> None:
        carrier = CARRIER[tensor.element_size()]
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        self.flat = torch.empty(0, dtype=carrier, device=tensor.device).set_(storage, 0, (size,), (1,))
        self.shift = shift
        self._live = np.dtype(f"<u{tensor.element_size()}")
        self._host = self.flat.numpy().view(self._live) if self.flat.device.type == "cpu" else None
        self._shipped = np.dtype(f"<u{tensor.element_size() - shift // 8}")

    @property
    def is_on_host(self) -> bool:
        """Whether it is written without torch, by threads that release the interpreter's lock."""
        return self._host is not None

    def on_device(self, offsets: Positions) -> torch.Tensor:
        """Offsets as this device wants them."""
        return torch.from_numpy(offsets).to(self.flat.device)

    def bits_on_device(self, bits: UInts) -> torch.Tensor:
        """Bits as this device wants them. Raises DtypeMismatch for values that need more bits than live ones have."""
        if self.shift < 0 and (lost := int(np.count_nonzero(bits & ((1 << -self.shift) - 1)))):
            raise DtypeMismatch(
                f"{lost} values need more than the {8 * self._live.itemsize} bits that the server holds; publish it "
                'rounded to those, by Publisher(dtype={"NAME": "BF16"})'
            )
        return _carried(np.ascontiguousarray(self._as_live(bits))).to(self.flat.device)

    def from_device(self, bits: torch.Tensor) -> UInts:
        """What `gather` brought, on the host, as the checkpoint has it."""
        return self._as_checkpoint(bits.cpu().numpy().view(self._live))

    def gather(self, offsets: torch.Tensor) -> torch.Tensor:
        """The bits at these offsets, as they lie there, on the device."""
        if self._host is None:
            return self.flat[offsets]
        from deltawire.weights import kernels

        return _carried(kernels.gather(self._host, offsets.numpy()))

    def scatter(self, offsets: torch.Tensor, bits: torch.Tensor) -> None:
        """Write bits, as `bits_on_device` made them, to these offsets."""
        if self._host is None:
            self.flat[offsets] = bits
            return
        from deltawire.weights import kernels

        kernels.scatter(self._host, offsets.numpy(), bits.numpy().view(self._live))

    def read(self, box: LiveBox) -> UInts:
        """A box's bits on the host, in row-major order; perhaps live memory itself, to look at now."""
        return self._as_checkpoint(to_host(self.view(box)))

    def differing(self, box: LiveBox, bits: UInts) -> Positions:
        """Row-major indices of a box's elements that are not these, in every bit of the live dtype."""
        if self.shift < 0:
            return np.flatnonzero(self.read(box) != bits)
        return np.flatnonzero(to_host(self.view(box)) != self._as_live(bits))

    def view(self, box: LiveBox) -> torch.Tensor:
        """A box of the storage, writable, with its bits as they lie there."""
        return self.flat.as_strided(box.shape, box.target_strides, box.target_offset)

    def _as_live(self, bits: UInts) -> UInts:
        """Bits as they lie here, of values that fit."""
        if self.shift < 0:
            return (bits >> -self.shift).astype(self._live)
        return _shifted(bits.astype(self._live), self.shift) if self.shift else bits

    def _as_checkpoint(self, bits: UInts) -> UInts:
        """Bits as the checkpoint has them. A value that its dtype cannot hold comes out wrong by its highest exponent
        bit, so that no digest takes it for the one it nearly is."""
        if not self.shift:
            return bits
        if self.shift < 0:
            return _shifted(bits.astype(self._shipped), -self.shift)
        narrow: UInts = (bits >> self.shift).astype(self._shipped)
        foreign = (bits & ((1 << self.shift) - 1)) != 0
        narrow[foreign] ^= narrow.dtype.type(1 << (8 * narrow.itemsize - 2))
        return narrow


def _shifted(bits: UInts, by: int) -> UInts:
    """Bits moved towards the high end."""
    return np.left_shift(bits, by, dtype=bits.dtype)


def _carried(bits: UInts) -> torch.Tensor:
    """Bits as torch carries them; shares their memory."""
    return torch.from_numpy(bits).view(CARRIER[bits.itemsize])


def digest_box(bits: UInts, box: LiveBox) -> int:
    """The part of a tensor's digest that a box makes; `bits` are its elements in row-major order."""
    run = 1
    for length, stride in reversed(list(zip(box.shape, box.source_strides, strict=True))):
        if stride != run:
            break
        run *= length
    starts = box.at(np.arange(0, box.size, run))[0]
    if starts.size * SHORT > box.size:
        return digest_at(box.at(np.arange(box.size))[0], bits)
    return sum(digest_bits(bits[n * run : (n + 1) * run], int(at)) for n, at in enumerate(starts)) % MODULUS


def to_host(view: torch.Tensor) -> UInts:
    """A view's bits as a flat array on the host, in row-major order."""
    width = view.element_size()
    flat = view.detach().contiguous().reshape(-1).view(CARRIER[width])
    bits: UInts = flat.cpu().numpy().view(np.dtype(f"<u{width}"))
    return bits


def fingerprint(tensor: torch.Tensor) -> int:
    """The digest of a live tensor's bits, in row-major order; the host sees one chunk of an accelerator at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(CARRIER[tensor.element_size()])
    total = 0
    for start, chunk in _chunks(flat):
        total += digest_bits(to_host(chunk), start)
    return total % MODULUS


def _chunks(flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    length = max(flat.numel(), 1) if flat.device.type == "cpu" else CHUNK
    for start in range(0, flat.numel(), length):
        yield start, flat[start : start + length]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    carrier = CARRIER[one.element_size()]
    return torch.equal(one.detach().contiguous().view(carrier), other.detach().contiguous().view(carrier))
