"""Random weights in a model's shape where a trainer has them, and a module that serves them."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from deltawire.weights.bits import Bits
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import as_bits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
TENSORS = 20
"""of a made-up shape"""


class Shapes(NamedTuple):
    """By name, the shape of each tensor; `elements` of all."""

    of: dict[str, tuple[int, ...]]
    elements: int


def shapes_of(size: str) -> Shapes:
    """The shapes of "0.6b", "8b", or of so many weights."""
    if size.isdigit():
        shapes = {f"layers.{number}.weight": (max(1, int(size) // TENSORS),) for number in range(TENSORS)}
    else:
        from random_models import empty_model  # the tests' own way to a model

        shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(size).named_parameters()}
    return Shapes(shapes, sum(torch.Size(shape).numel() for shape in shapes.values()))


class Weights(Mapping[str, Bits]):
    """A trainer's tensors on a device; as a mapping, their bits in bf16 on the host."""

    def __init__(self, size: str, dtype: torch.dtype, device: str) -> None:
        shapes = shapes_of(size)
        self.device, self.width, self.count = device, dtype.itemsize, shapes.elements
        self.size = f"{int(size):,}" if size.isdigit() else size.upper()
        self.name = f"{self.size} {str(dtype).removeprefix('torch.')}"
        self._random = torch.Generator(device).manual_seed(0)
        self.tensors = {
            name: (0.02 * torch.randn(shape, generator=self._random, device=device)).to(dtype)
            for name, shape in shapes.of.items()
        }

    def edit(self, share: float) -> None:
        """Move about this share of the elements up by one step of bf16, at random positions."""
        for tensor in self.tensors.values():
            carrier, one = (torch.int32, 1 << 16) if self.width == 4 else (torch.int16, 1)
            flat = tensor.view(carrier).view(-1)
            count = max(1, int(share * flat.numel()))
            flat[torch.randint(flat.numel(), (count,), generator=self._random, device=self.device)] += one

    @property
    def entries(self) -> list[TensorEntry]:
        return [TensorEntry(name, "BF16", tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __getitem__(self, name: str) -> Bits:
        return as_bits(self.tensors[name].bfloat16().cpu())

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Served(torch.nn.Module):
    """A model in bf16 on a device whose tensors have the checkpoint's names, with a loader as a server's."""

    def __init__(self, weights: Weights, device: str) -> None:
        super().__init__()
        self._held = {name: torch.nn.Parameter(tensor.to(device, torch.bfloat16, copy=True), requires_grad=False)
                      for name, tensor in weights.tensors.items()}  # fmt: skip
        for name, parameter in self._held.items():
            self.register_parameter(name.replace(".", "__"), parameter)

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in pairs:
            self._held[name].copy_(tensor)
