"""Live parameters as flat integers: gather, scatter and digest bits where they lie, on whichever device they are."""

from collections.abc import Iterator

import numpy as np
import torch

from deltawire.bits import Positions, UInts
from deltawire.digest import MODULUS, digest_bits

CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""the integer dtype that carries bits through torch, by width in bytes"""
CHUNK = 1 << 24
"""elements copied from an accelerator at a time for a digest"""


class Memory:
    """The whole storage behind one live tensor, as a flat vector of integers as wide as its dtype.

    Writing goes through the storage itself and never rebinds it: captured CUDA graphs hold its address.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        carrier = CARRIER[tensor.element_size()]
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        self.flat = torch.empty(0, dtype=carrier, device=tensor.device).set_(storage, 0, (size,), (1,))
        self._unsigned = np.dtype(f"<u{tensor.element_size()}")

    def on_device(self, offsets: Positions) -> torch.Tensor:
        """Offsets as this device wants them."""
        return torch.from_numpy(offsets).to(self.flat.device)

    def bits_on_device(self, bits: UInts) -> torch.Tensor:
        """Bits as this device wants them."""
        signed = np.ascontiguousarray(bits).view(np.uint8 if bits.itemsize == 1 else f"<i{bits.itemsize}")
        return torch.from_numpy(signed).to(self.flat.device)

    def gather(self, offsets: torch.Tensor) -> UInts:
        """The bits at these offsets, on the host."""
        bits: UInts = self.flat[offsets].cpu().numpy().view(self._unsigned)
        return bits

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
        """A rectangle of the storage, writable."""
        return self.flat.as_strided(shape, strides, offset)


def to_host(view: torch.Tensor) -> UInts:
    """A view's bits as a flat array on the host, in row-major order."""
    width = view.element_size()
    bits: UInts = view.contiguous().reshape(-1).cpu().numpy().view(np.dtype(f"<u{width}"))
    return bits


def fingerprint(tensor: torch.Tensor) -> int:
    """The digest of a live tensor's bits, in row-major order; the host sees one chunk of an accelerator at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(CARRIER[tensor.element_size()])
    total = 0
    for start, chunk in _chunks(flat):
        total += digest_bits(to_host(chunk), start)
    return total % MODULUS


def _chunks(flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(flat.numel(), 1) if flat.device.type == "cpu" else CHUNK
    for start in range(0, flat.numel(), step):
        yield start, flat[start : start + step]
