"""Comparing weights of a device with a baseline on the host: they cross in pieces, each while the last is compared.

Two pieces of pinned memory are all that is taken of the host, and a cast piece or two of the device.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltawire.publish.streams import beside_trainer, landing
from deltawire.weights import threads
from deltawire.weights.bits import Bits, Positions, UInts
from deltawire.weights.delta import TensorDelta, settle
from deltawire.weights.device.carriers import CARRIERS
from deltawire.weights.device.torch_twin import bf16_bits
from deltawire.weights.tensors import cast_by_torch

PIECE = 1 << 23
"""elements that cross at a time"""
WORTH = 1 << 18
"""elements of a piece from which it is compared by several threads"""


def carrier(tensor: torch.Tensor, through: str | None, dtype: str) -> torch.Tensor:
    """A tensor's bits as `dtype`, flat, by way of dtype `through` if there is one. What is float32 and is to be BF16
    stays as it is, for a comparison that rounds; see `bf16_bits`."""
    tensor = tensor.detach()
    if through is not None:
        tensor = cast_by_torch(tensor, through)
    if tensor.dtype == torch.float32 and dtype == "BF16":
        return tensor.contiguous().reshape(-1)
    flat = cast_by_torch(tensor, dtype).contiguous().reshape(-1)
    return flat.view(CARRIERS[flat.element_size()])


def compare(tensor: torch.Tensor, through: str | None, held: Bits) -> TensorDelta:
    """The change from the baseline of a tensor to the tensor, which is cast as `carrier` casts it; nothing moves."""
    crossing = _Crossing(_flat(tensor), through, held)
    found = []
    with beside_trainer(tensor.device):
        for start, new in crossing.pieces():
            found += [(start + at, steps) for at, steps in _compare(held.data[start : start + new.size], new)]
    positions = [at for at, _ in found] or [np.empty(0, np.int64)]
    steps = [own for _, own in found] or [np.empty(0, held.data.dtype)]
    return settle(held.dtype, held.shape, np.concatenate(positions), np.concatenate(steps))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in row-major order: a copy of one that is strided, on the host where the device has no room."""
    with suppress(torch.OutOfMemoryError):
        return tensor.detach().reshape(-1)
    return tensor.detach().cpu().reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Crossing:
    flat: torch.Tensor
    through: str | None
    held: Bits

    def pieces(self) -> Iterator[tuple[int, UInts]]:
        """Where each piece starts, and its bits on the host; while one is looked at the next is on its way."""
        starts = range(0, self.flat.numel(), PIECE)
        buffers = [self._buffer() for _ in starts[:2]]
        sent: list[tuple[int, torch.Tensor, Any]] = []
        for number, start in enumerate(starts):
            sent.append((start, *self._send(start, buffers[number % 2])))
            if len(sent) > 1:
                yield self._arrived(*sent.pop(0))
        for piece in sent:
            yield self._arrived(*piece)

    def _buffer(self) -> torch.Tensor:
        return landing(min(PIECE, self.flat.numel()), CARRIERS[self.held.data.itemsize], self.flat.device)

    def _send(self, start: int, buffer: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Queue a piece's copy; where it will be, and the event that says so."""
        piece = self.flat[start : start + PIECE]
        try:
            bits = self._cast(piece)
        except torch.OutOfMemoryError:
            bits = None
        if bits is None:  # no room to cast there
            bits = self._cast(piece.cpu())
        place = buffer[: bits.numel()].copy_(bits, non_blocking=True)
        if not self.flat.is_cuda:
            return place, None
        event = torch.cuda.Event()
        event.record()
        return place, event

    def _cast(self, piece: torch.Tensor) -> torch.Tensor:
        flat = carrier(piece, self.through, self.held.dtype)
        return bf16_bits(flat) if flat.dtype == torch.float32 else flat

    def _arrived(self, start: int, place: torch.Tensor, event: Any) -> tuple[int, UInts]:
        if event is not None:
            event.synchronize()
        new: UInts = np.from_dlpack(place).view(self.held.data.dtype)
        return start, new


def _compare(old: UInts, new: UInts) -> list[tuple[Positions, UInts]]:
    """What changed in a piece, on all cores. The baseline never changes meanwhile, and `new` is ours."""
    from deltawire.weights import kernels

    share = -(-old.size // threads.cores()) if old.size >= WORTH else old.size
    parts = range(0, old.size, max(share, 1))

    def work(start: int) -> tuple[Positions, UInts]:
        at, steps = kernels.compare_and_collect(old[start : start + share], new[start : start + share])
        return at + start, steps

    return list(threads.run(work, parts))
