"""Several deltas, one after another, as one change: also where some are read against the weights before them, and of
parts of tensors alone.

All deltas of one tensor come before the next tensor. So one tensor is in memory whole at a time: its old bits, and its
change before that is cut to what is kept of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltawire.errors import NeedsBase, WrongBase
from deltawire.format.delta_file import DeltaFile
from deltawire.read.held import HELD
from deltawire.weights.bits import Bits
from deltawire.weights.blocks import PartBits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.kept import Kept, KeptParts
from deltawire.weights.tensors import as_bits


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One record's change, and where it is from. Its `files` are decoded when it is added up; a change that is at hand
    is `known`. `undo` takes it back."""

    where: str
    files: tuple[DeltaFile, ...] = ()
    known: Delta = field(default_factory=Delta)
    undo: bool = False

    @property
    def names(self) -> set[str]:
        """The tensors that it changes."""
        return {*self.known, *(name for file in self.files for name in file.names)}

    @property
    def needed(self) -> bool:
        """Whether anything in it is read against the weights before it."""
        return any(file.needs for file in self.files)

    def needs(self, name: str) -> bool:
        """Whether a tensor's change is read against its bits before it. Raises NeedsBase for one to be taken back."""
        needed = any(name in file.needs for file in self.files)
        if needed and self.undo:
            raise NeedsBase(f'{self.where} is of codec "class": it cannot be taken back with the weights after it')
        return needed

    def tensor(self, name: str, old: Bits | None, kept: Kept | None = None) -> TensorDelta | None:
        """What it does to one tensor, or to what is `kept` of it; None where that is nothing. What is at hand is of the
        same."""
        found = [file.tensor(name, old if name in file.needs else None, kept) for file in self.files if name in file]
        found += [self.known[name]] if name in self.known else []
        if not found:
            return None
        change, *others = found
        for other in others:
            change += other
        return -change if self.undo else change


class Moved(Mapping[str, Bits]):
    """Weights with a change added, tensor by tensor as they are asked for: neither is copied as a whole. After a change
    of what is `kept`, only that is at hand."""

    def __init__(self, weights: Mapping[str, Any], change: Delta | None = None, kept: KeptParts | None = None) -> None:
        self._weights, self._change, self._kept = weights, Delta() if change is None else change, kept

    def move(self, change: Delta) -> None:
        """Add one more change."""
        self._change += change

    def __getitem__(self, name: str) -> Bits:
        bits = as_bits(self._weights[name])
        if name not in self._change:
            return bits
        return _moved(bits, self._change[name], None if self._kept is None else self._kept[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def add_up(
    parts: Sequence[Part], weights: Mapping[str, Any] | None, kept: KeptParts | None = None
) -> tuple[Delta, dict[str, Delta]]:
    """All parts as one change, of what is `kept` of each tensor (None: of whole ones). Beside it, by where they are
    from, the changes of those that need weights, the newest first: as many as a reader holds. `weights` are those
    before the first part.

    Raises FormatError for a file that is damaged, NeedsBase where the weights that it is read against are not given,
    WrongBase where these cannot be they.
    """
    total: dict[str, TensorDelta] = {}
    decoded: dict[str, dict[str, TensorDelta]] = {part.where: {} for part in reversed(parts) if part.needed}
    room = HELD
    for name in sorted(set().union(*(part.names for part in parts))):
        if kept is not None and name not in kept:
            continue
        for part, change in _changes(name, parts, weights, None if kept is None else kept[name]):
            total[name] = total[name] + change if name in total else change
            if part.where in decoded:
                decoded[part.where][name] = change
                room -= change.nbytes
        while room < 0 and decoded:
            _, oldest = decoded.popitem()
            room += sum(change.nbytes for change in oldest.values())
    return Delta(total), {where: Delta(own) for where, own in decoded.items()}


def change_of(
    name: str, parts: Sequence[Part], weights: Mapping[str, Any] | None, kept: Kept | None = None
) -> TensorDelta | None:
    """What all parts do to one tensor, or to what is `kept` of it; None where that is nothing. Raises what `add_up`
    does."""
    total: TensorDelta | None = None
    for _, change in _changes(name, parts, weights, kept):
        total = change if total is None else total + change
    return total


def _changes(
    name: str, parts: Sequence[Part], weights: Mapping[str, Any] | None, kept: Kept | None
) -> Iterator[tuple[Part, TensorDelta]]:
    """What each part does to one tensor, in order. Its old bits are kept up only as far as a later part needs them."""
    needing = [number for number, part in enumerate(parts) if part.needs(name)]
    old = _old(name, parts[needing[0]], weights) if needing else None
    for number, part in enumerate(parts):
        moves = old is not None and number < needing[-1]
        cut_later = moves and not part.known  # a later part may be read against more of the tensor than what is kept
        try:
            change = part.tensor(name, old, None if cut_later else kept)
        except WrongBase as error:
            raise WrongBase(f"{part.where}: {error}") from None
        if change is None:
            continue
        if old is not None and moves:
            old = _moved(old, change, None if cut_later else kept)
        yield part, kept.cut(change) if kept is not None and cut_later else change


def _old(name: str, part: Part, weights: Mapping[str, Any] | None) -> Bits:
    if weights is None:
        raise NeedsBase(
            f'{part.where} is of codec "class", which is read against the weights before it: pass them as weights=, or '
            "begin at an anchor"
        )
    return as_bits(weights[name])


def _moved(bits: Bits, change: TensorDelta, kept: Kept | None) -> Bits:
    """The bits after a change of them, in memory of their own; or after one of what is kept of them, and no others."""
    own = bits.copy()
    (change if kept is None else kept.spread(change)).apply_(own.data)
    return own if kept is None or isinstance(own, PartBits) else kept.among(own)
