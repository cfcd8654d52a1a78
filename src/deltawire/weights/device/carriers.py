"""What the sweeps over a device's tensors take and give.

A carrier is a flat, contiguous torch tensor of integers as wide as the elements whose bits it holds: uint8, int16,
int32 or int64, for torch computes with few unsigned ones.
"""

from dataclasses import dataclass

import torch

from deltawire.errors import ConcurrentWrite

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""the dtype of a carrier, by bytes per element"""
_FAR = 1 << 62
"""a run longer than any tensor"""


@dataclass(frozen=True, slots=True)
class Strip:
    """Where elements stand in a checkpoint tensor: element i at `offset + (i // run) * stride + i % run`.

    By default the elements are neighbours, and the first is the tensor's first.
    """

    offset: int = 0
    run: int = _FAR
    stride: int = 0

    def is_run(self, size: int) -> bool:
        """Whether so many elements are neighbours."""
        return size <= self.run or self.stride == self.run


WHOLE = Strip()
"""all of a tensor"""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A carrier, and where its elements stand in the checkpoint tensor."""

    bits: torch.Tensor
    strip: Strip = WHOLE


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What changed in several tensors of one width, the tensors one behind another, on the device.

    `counts` says how many elements changed of each. `positions` are flat positions in each tensor, ascending: int32
    where all tensors are small enough, else int64. `increments` are new minus old, modulo the width, and none is zero;
    `bits` are the new bits. Both are carriers.
    """

    counts: tuple[int, ...]
    positions: torch.Tensor
    increments: torch.Tensor
    bits: torch.Tensor


def positions_for(sizes: list[int]) -> torch.dtype:
    """The dtype of positions in tensors of so many elements."""
    return torch.int64 if any(size > 1 << 31 for size in sizes) else torch.int32


def written_meanwhile() -> ConcurrentWrite:
    """The error for an element that changed between two passes over the weights."""
    return ConcurrentWrite(
        "the weights were written while they were compared, by another stream or thread. Publish once the optimizer's "
        "step is queued on the current stream; what was captured before goes with the next call"
    )
