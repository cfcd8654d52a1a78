"""Changes as a comparison finds them, in arrays with room for more; and memory that is used again."""

from typing import Any, TypeVar

import numpy as np

from deltawire.weights.bits import Positions, UInts

GUESS = 64
"""The room is first for a change in so many elements: most steps of a trainer change fewer. What is not written of it
takes no memory."""
SPARE = 1024
"""and for so many more: a loop that takes many elements at a time wants room for each of them"""
MORE = 4
"""How many times as many changes there is room for whenever that is not enough."""


_Array = TypeVar("_Array", UInts, Positions)


class Found:
    """Positions and steps, of which the first `count` are written."""

    def __init__(self, elements: int, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.positions: Positions = np.empty(room_for(elements), np.int64)
        self.steps: UInts = np.empty(room_for(elements), dtype)
        self.count = 0

    def has_room(self, more: int) -> bool:
        """Whether so many more fit."""
        return self.count + more <= self.positions.size

    def grow(self) -> None:
        """Make more room."""
        self.positions, self.steps = roomier(self.positions, self.count), roomier(self.steps, self.count)

    def append(self, positions: Positions, steps: UInts) -> None:
        """Write more changes."""
        while not self.has_room(positions.size):
            self.grow()
        places = slice(self.count, self.count + positions.size)
        self.positions[places], self.steps[places] = positions, steps
        self.count += positions.size

    def take(self) -> tuple[Positions, UInts]:
        """All that was found. The room that is left is given back in place: a view would keep it."""
        for part in (self.positions, self.steps):
            part.resize(self.count, refcheck=False)
        return self.positions, self.steps


class Scratch:
    """Memory that a loop uses for one tile after another. New pages cost more than what is written to them: where a
    fault takes 2 microseconds, a third of a publish."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def array(self, name: str, size: int, dtype: Any) -> Any:
        """So many elements, of any value; the same memory as the last array of this name."""
        return self.at_least(name, size, dtype)[:size]

    def at_least(self, name: str, size: int, dtype: Any) -> Any:
        """The same, and all that there is of it."""
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = self._kept[name] = np.empty(size + size // 2, dtype)
        return kept

    def grow(self, name: str, count: int) -> Any:
        """More of an array, which keeps its `count` first elements."""
        more = self._kept[name] = roomier(self._kept[name], count)
        return more


def room_for(elements: int) -> int:
    """How many changes of so many elements there is room for at first."""
    return elements // GUESS + SPARE


def roomier(part: _Array, count: int) -> _Array:
    """An array of MORE times the room that begins with the `count` elements of this one."""
    more: _Array = np.empty(MORE * part.size, part.dtype)
    more[:count] = part[:count]
    return more
