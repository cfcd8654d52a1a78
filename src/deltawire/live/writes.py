"""Writes to live memory: what they put there, and what was there, so that each can be undone.

All is placed and compared already: writing and undoing only move bits.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltawire.live.accelerator import Accelerator
from deltawire.live.arena import Room
from deltawire.live.boxes import LiveBox
from deltawire.live.memory import Memory, flat_of
from deltawire.live.threads import run_together
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.device import sweeps

Copies = Mapping[int, torch.Tensor]
"""copies of live tensors, by the address of the storage that each is a copy of"""


@dataclass(frozen=True, slots=True, eq=False)
class Scatter:
    """Elements of one storage in host memory: where, what is there, and what will be."""

    memory: Memory
    offsets: Positions
    old: UInts
    new: UInts

    def write(self) -> None:
        """Put the new bits."""
        self.memory.scatter(self.offsets, self.new)

    def undo(self) -> None:
        """Put the old bits back."""
        self.memory.scatter(self.offsets, self.old)

    def write_to(self, copies: Copies) -> None:
        """Put the new bits into a copy of the storage, if there is one."""
        if (copied := copies.get(self.memory.address)) is not None:
            self.memory.like(copied).scatter(self.offsets, self.new)


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A whole rectangle of live memory, for a tensor that changed nearly everywhere. Its bits are in host memory."""

    memory: Memory
    box: LiveBox
    old: torch.Tensor
    new: torch.Tensor

    def write(self) -> None:
        """Put the new bits."""
        self.memory.put(self.box, self.new)

    def undo(self) -> None:
        """Put the old bits back."""
        self.memory.put(self.box, self.old)

    def write_to(self, copies: Copies) -> None:
        """Put the new bits into a copy of the storage, if there is one."""
        if (copied := copies.get(self.memory.address)) is not None:
            self.memory.like(copied).put(self.box, self.new)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Elements of several storages of one width, which are written in one launch: of each flat storage so many as
    `counts` says, one storage behind another. `scattering` is made ready for it."""

    flats: Sequence[torch.Tensor]
    counts: Sequence[int]
    offsets: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    scattering: sweeps.Put


@dataclass(frozen=True, slots=True, eq=False)
class ScatterTogether:
    """Elements of all storages of one width on an accelerator. They stand there in `room`, in one run; without a room
    they stand in host memory, in runs that cross one after another."""

    accelerator: Accelerator
    runs: Sequence[Run]
    room: Room | None

    def write(self) -> None:
        """Put the new bits."""
        for run in self.runs:
            self._put(run.scattering, run.offsets, run.new)

    def undo(self) -> None:
        """Put the old bits back."""
        for run in self.runs:
            self._put(run.scattering, run.offsets, run.old)

    def write_to(self, copies: Copies) -> None:
        """Put the new bits into copies of the storages, those that there are."""
        for run in self.runs:
            start = 0
            for flat, count in zip(run.flats, run.counts, strict=True):
                own, start = slice(start, start + count), start + count
                if (copied := copies.get(flat.data_ptr())) is not None:
                    put = functools.partial(sweeps.scatter, [flat_of(copied)], [count])
                    self._put(put, run.offsets[own], run.new[own])

    def _put(self, scattering: sweeps.Put, offsets: torch.Tensor, bits: torch.Tensor) -> None:
        if self.room is not None:
            scattering(offsets, bits)
            return
        with self.accelerator.crossing() as window:
            there = window.take(offsets.numel(), offsets.dtype).copy_(offsets, non_blocking=True)
            scattering(there, window.take(bits.numel(), bits.dtype).copy_(bits, non_blocking=True))


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


Patch = Scatter | Fill | ScatterTogether
Write = Patch | Swap


def apply(writes: Sequence[Write]) -> None:
    """Write everything, or (when a write fails) put everything back and raise. No two writes touch one element."""
    shared, elements, rest = [], 0, []
    for write in writes:
        if isinstance(write, Scatter):
            shared.append(write.write)
            elements += write.new.size
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
