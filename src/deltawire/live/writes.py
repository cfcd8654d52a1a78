"""Writes to live memory: what they put there, and what was there, so that each can be undone.

All is on the device already: writing and undoing only move bits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltawire.live.boxes import LiveBox
from deltawire.live.memory import Memory
from deltawire.live.threads import run_together


@dataclass(frozen=True, slots=True, eq=False)
class Scatter:
    """Elements of one storage: where, what is there, and what will be. On the device already."""

    memory: Memory
    offsets: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    def put(self, memory: Memory, bits: torch.Tensor) -> None:
        """Write bits to the same elements of a storage."""
        memory.scatter(self.offsets, bits)

    def write(self) -> None:
        """Put the new bits."""
        self.put(self.memory, self.new)

    def undo(self) -> None:
        """Put the old bits back."""
        self.put(self.memory, self.old)


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A whole rectangle of live memory, for a tensor that changed nearly everywhere."""

    memory: Memory
    box: LiveBox
    old: torch.Tensor
    new: torch.Tensor

    def put(self, memory: Memory, bits: torch.Tensor) -> None:
        """Write bits to the same rectangle of a storage."""
        memory.view(self.box).copy_(bits)

    def write(self) -> None:
        """Put the new bits."""
        self.put(self.memory, self.new)

    def undo(self) -> None:
        """Put the old bits back."""
        self.put(self.memory, self.old)


@dataclass(frozen=True, slots=True, eq=False)
class SwappedTensor:
    """A live tensor whose bits are replaced in place: by which, and what was there."""

    live: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SwappedAttribute:
    """An attribute of a module that is set: to what, and what it was."""

    name: str
    old: object
    new: object


@dataclass(frozen=True, slots=True, eq=False)
class Swap:
    """What a module's transform makes of its new weights, made on a shadow. It goes into the live tensors, in place,
    and into the attributes that hold what is out of sight."""

    module: nn.Module
    tensors: tuple[SwappedTensor, ...]
    attributes: tuple[SwappedAttribute, ...]

    def write(self) -> None:
        """Put the new results."""
        for tensor in self.tensors:
            tensor.live.copy_(tensor.new)
        for attribute in self.attributes:
            setattr(self.module, attribute.name, attribute.new)

    def undo(self) -> None:
        """Put the old results back."""
        for tensor in self.tensors:
            tensor.live.copy_(tensor.old)
        for attribute in self.attributes:
            setattr(self.module, attribute.name, attribute.old)


Write = Scatter | Fill | Swap


def apply(writes: Sequence[Write]) -> None:
    """Write everything, or (when a write fails) put everything back and raise. No two writes touch one element."""
    shared, elements, rest = [], 0, []
    for write in writes:
        if isinstance(write, Scatter) and write.memory.is_on_host:
            shared.append(write.write)
            elements += write.new.numel()
        else:
            rest.append(write)
    try:
        run_together(shared, elements)
        with torch.inference_mode():
            for write in rest:
                write.write()
    except BaseException:
        undo(writes)
        raise


def undo(writes: Iterable[Write]) -> None:
    """Put back what `apply` replaced, all of it or a part."""
    with torch.inference_mode():
        for write in writes:
            write.undo()
