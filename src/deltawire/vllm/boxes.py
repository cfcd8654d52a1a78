"""Rectangles of checkpoint tensors, the live memory that holds them, and what makes a tensor unfit to be patched there.

Pure values over sizes and strides: how they are learned is in `placement`.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from deltawire.bits import Positions
from deltawire.errors import EngineUnsupported
from deltawire.manifests import TensorEntry
from deltawire.tensors import dtype_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a checkpoint tensor and the rectangle of a live storage that holds it; offsets and strides count
    elements, `source_*` in the flat checkpoint tensor, `target_*` in the storage behind parameter `parameter`."""

    shape: Shape
    source_offset: int
    source_strides: Shape
    parameter: str
    target_offset: int
    target_strides: Shape

    def locate(self, positions: Positions) -> tuple[np.ndarray, Positions]:
        """Which of these flat checkpoint positions lie in the box (a mask), and their offsets in the storage."""
        rest = positions - self.source_offset
        inside = rest >= 0
        offsets = np.full(positions.size, self.target_offset, np.int64)
        order = sorted(range(len(self.shape)), key=lambda dim: -self.source_strides[dim])
        for dim in order:
            at, rest = np.divmod(rest, self.source_strides[dim])
            inside &= at < self.shape[dim]
            offsets += at * self.target_strides[dim]
        inside &= rest == 0
        return inside, offsets[inside]

    @property
    def extent(self) -> tuple[int, int]:
        """First and last storage offset the box touches."""
        return extent_of(self.target_offset, self.shape, self.target_strides)


@dataclass(slots=True)
class Placement:
    """Boxes by checkpoint name, and for names that cannot be patched in place, why."""

    boxes: dict[str, list[Box]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)

    def require(self, names: Iterable[str]) -> None:
        """Raise EngineUnsupported, naming each tensor that cannot be patched in place and why."""
        bad = [f"{name} ({self.unfit[name]})" for name in names if name in self.unfit]
        if bad:
            raise EngineUnsupported(
                f"{len(bad)} tensors cannot be patched in place on this server: {'; '.join(bad[:4])}. "
                "Serve this model with weights that vLLM keeps as they are loaded"
            )


def fault(entry: TensorEntry, boxes: list[Box], live: Mapping[str, torch.Tensor]) -> str | None:
    """Why a tensor that was only copied still does not qualify, or None when it does."""
    size = prod(entry.shape)
    if not boxes:
        return "the model does not load it" if size else None
    for box in boxes:
        held = dtype_of(live[box.parameter])
        if held != entry.dtype:
            return f"the server holds {held}, the run ships {entry.dtype}"
    covered = sum(prod(box.shape) for box in boxes)
    if covered != size or not (_is_whole(boxes[0], size) or _disjoint(entry, boxes)):
        return f"{covered} of its {size} elements arrive, or some arrive twice"
    return None


def _is_whole(box: Box, size: int) -> bool:
    """Whether the box is the whole tensor with its dimensions in some order, which no view that overlaps itself is."""
    dense = 1
    for stride, length in sorted(zip(box.source_strides, box.shape, strict=True)):
        if stride != dense:
            return False
        dense *= length
    return dense == size and box.source_offset == 0


def _disjoint(entry: TensorEntry, boxes: list[Box]) -> bool:
    seen = torch.zeros(prod(entry.shape), dtype=torch.bool)
    for box in boxes:
        seen.as_strided(box.shape, box.source_strides, box.source_offset).fill_(True)
    return bool(seen.all())


def overwritten(boxes: Mapping[str, list[Box]], writes: list[tuple[str, int, int, str]]) -> dict[str, str]:
    """Names whose memory some operation other than their own copy would write."""
    by_parameter: dict[str, list[tuple[int, int, str]]] = {}
    for name, parts in boxes.items():
        for box in parts:
            by_parameter.setdefault(box.parameter, []).append((*box.extent, name))
    return {
        name: f"its loader also runs {what} over it"
        for parameter, first, last, what in writes
        for start, stop, name in by_parameter.get(parameter, [])
        if first <= stop and start <= last
    }


def shared(boxes: Mapping[str, list[Box]]) -> dict[str, str]:
    """Names that land, somewhere, where another name landed before: only one of the two can be read back."""
    faults: dict[str, str] = {}
    by_parameter: dict[str, list[tuple[str, Box]]] = {}
    for name, parts in boxes.items():
        for box in parts:
            by_parameter.setdefault(box.parameter, []).append((name, box))
    for parameter, tenants in by_parameter.items():
        ends = sorted(box.extent for _, box in tenants)
        if all(stop < start for (_, stop), (start, _) in itertools.pairwise(ends)):
            continue
        taken = torch.zeros(1 + max(stop for _, stop in ends), dtype=torch.bool)
        for name, box in tenants:
            region = taken.as_strided(box.shape, box.target_strides, box.target_offset)
            if region.any():
                faults[name] = f"another tensor of the run lands in the same part of {parameter}"
            region.fill_(True)
    return faults


def extent_of(offset: int, shape: Shape, strides: Shape) -> tuple[int, int]:
    """First and last offset of a rectangle."""
    return offset, offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
