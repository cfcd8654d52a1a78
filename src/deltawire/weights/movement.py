"""Where a delta moves a model: layer by layer, how many elements change, and how many by one step of their bits."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from deltawire.weights.delta import Delta, TensorDelta

_NUMBERED = re.compile(r"(.*?\.\d+)\..+")


@dataclass(frozen=True, slots=True)
class Movement:
    """What changes in one layer, or in one tensor.

    `changed` of `elements` differ. `ones` of those differ by the smallest step of their dtype, up or down. `moved` of
    `tensors` have any change.
    """

    name: str
    tensors: int
    moved: int
    elements: int
    changed: int
    ones: int

    @property
    def density(self) -> float:
        """Share of elements that change, 0 to 1."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def ones_share(self) -> float:
        """Share of the changes that are by one step, 0 to 1; 0 where nothing changes."""
        return self.ones / self.changed if self.changed else 0.0


def movements(delta: Delta, sizes: Mapping[str, int], *, by_tensor: bool = False) -> list[Movement]:
    """The movement of each layer in the order of `sizes`, which maps every tensor to its elements; those that stay
    are there too. With `by_tensor` that of each tensor."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(name if by_tensor else layer_of(name), []).append(name)
    return [_movement(layer, names, delta, sizes) for layer, names in groups.items()]


def total(parts: Iterable[Movement], name: str = "all") -> Movement:
    """Several movements as one."""
    found = [*parts]
    sums = (
        sum(getattr(part, field) for part in found) for field in ("tensors", "moved", "elements", "changed", "ones")
    )
    return Movement(name, *sums)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number, else all but the last part."""
    if numbered := _NUMBERED.fullmatch(name):
        return numbered[1]
    return name.rpartition(".")[0] or name


def _movement(layer: str, names: list[str], delta: Delta, sizes: Mapping[str, int]) -> Movement:
    moved = [delta[name] for name in names if name in delta]
    ones = sum(map(_ones, moved))
    changed = sum(tensor.changed for tensor in moved)
    return Movement(layer, len(names), len(moved), sum(sizes[name] for name in names), changed, ones)


def _ones(tensor: TensorDelta) -> int:
    """Changes by plus or minus one step."""
    increments = tensor.increments
    return int(np.count_nonzero((increments == 1) | (increments == np.iinfo(increments.dtype).max)))
