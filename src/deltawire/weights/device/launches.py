"""How a Triton kernel works on many tensors at once: blocks are dealt to them, and a table has the facts of each."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from deltawire.weights.device.landing import landing

KINDS = {torch.uint8: tl.uint8, torch.int16: tl.uint16, torch.int32: tl.uint32, torch.int64: tl.uint64}
"""elements of a carrier, as the kernels read them"""


@triton.jit
def dealt(tensors, table, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tensor that this program works on, its elements' numbers there, and which of these the tensor has.

    The table's first rows are the sizes and the first blocks of `n` tensors.
    """
    block = tl.program_id(0)
    tensor = tl.load(tensors + block)
    at = (block - tl.load(table + n + tensor)) * BLOCK + tl.arange(0, BLOCK)
    return tensor, at, at < tl.load(table + tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """The blocks that several tensors take, dealt out in order, and a table with a row of numbers for each tensor.

    `tensors` says of each block which tensor it is of. The table's last row is how many blocks each takes.
    """

    tensors: torch.Tensor
    table: torch.Tensor
    block: int

    @classmethod
    def over(cls, sizes: Sequence[int], block: int, device: torch.device, *rows: Sequence[int]) -> "Launch":
        blocks = [-(-size // block) for size in sizes]
        numbers = torch.tensor([[*sizes], starts(blocks), *map(list, rows), blocks], device="cpu")
        landed = landing(numbers.numel(), numbers.dtype, device).view(numbers.shape).copy_(numbers)
        table = landed.to(device, non_blocking=True)
        owners = torch.arange(len(blocks), device=device)
        tensors = torch.repeat_interleave(owners, table[-1], output_size=sum(blocks))
        return cls(tensors, table, block)

    def empty(self, kind: torch.dtype, *each: int) -> torch.Tensor:
        """A number a block, or an array of the shape `each`."""
        return torch.empty((self.tensors.numel(), *each), dtype=kind, device=self.table.device)

    def run(self, kernel: Any, *arguments: torch.Tensor, **constants: Any) -> None:
        """Queue a kernel over all blocks."""
        if self.tensors.numel():
            with on(self.table.device):
                kernel[(self.tensors.numel(),)](
                    self.tensors, self.table, self.table.shape[1], *arguments, **constants, BLOCK=self.block
                )

    def per_tensor(self, of_blocks: torch.Tensor) -> list[int]:
        """Sums of the blocks' numbers by tensor, modulo 2^64 as int64. Waits for the stream."""
        sums = torch.nn.functional.pad(of_blocks.cumsum(0), (1, 0))
        ends = torch.cumsum(self.table[-1], 0)
        reached = sums[ends]
        return torch.diff(reached, prepend=reached.new_zeros(1)).tolist()


def addresses(flats: Sequence[torch.Tensor]) -> list[int]:
    """Where each tensor begins in memory."""
    return [flat.data_ptr() for flat in flats]


def starts(counts: Sequence[int]) -> list[int]:
    """The sum of all counts before each."""
    return list(accumulate(counts, initial=0))[:-1]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, on whose current stream Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
