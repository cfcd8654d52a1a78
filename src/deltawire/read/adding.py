"""Several deltas, one after another, as one change: also where some are read against the weights before them.

Then all deltas of one tensor come before the next tensor, so the old bits of one tensor are in memory at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltawire.errors import NeedsBase, WrongBase
from deltawire.format.delta_file import DeltaFile
from deltawire.read.held import HELD
from deltawire.weights.bits import WIDTHS, Bits
from deltawire.weights.delta import POSITION_BYTES, Delta, TensorDelta
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

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes once decoded."""
        specs = (spec for file in self.files for spec in file.header.tensors)
        return sum(spec.changed * (POSITION_BYTES + WIDTHS[spec.dtype]) for spec in specs)

    def needs(self, name: str) -> bool:
        """Whether a tensor's change is read against its bits before it. Raises NeedsBase for one to be taken back."""
        needed = any(name in file.needs for file in self.files)
        if needed and self.undo:
            raise NeedsBase(f'{self.where} is of codec "class": it cannot be taken back with the weights after it')
        return needed

    def tensor(self, name: str, old: Bits | None) -> TensorDelta | None:
        """What it does to one tensor; None where that is nothing."""
        found = [file.tensor(name, old if name in file.needs else None) for file in self.files if name in file]
        found += [self.known[name]] if name in self.known else []
        if not found:
            return None
        change, *others = found
        for other in others:
            change += other
        return -change if self.undo else change


class Moved(Mapping[str, Bits]):
    """Weights with a change added, tensor by tensor as they are asked for: neither is copied as a whole."""

    def __init__(self, weights: Mapping[str, Any], change: Delta | None = None) -> None:
        self._weights, self._change = weights, Delta() if change is None else change

    def move(self, change: Delta) -> None:
        """Add one more change."""
        self._change += change

    def __getitem__(self, name: str) -> Bits:
        bits = as_bits(self._weights[name])
        return _moved(bits, self._change[name]) if name in self._change else bits

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def add_up(parts: Sequence[Part], weights: Mapping[str, Any] | None) -> tuple[Delta, dict[str, Delta]]:
    """All parts as one change. Beside it, by where they are from, the changes of those that need weights, the newest
    first: as many as a reader holds. `weights` are those before the first part.

    Raises FormatError for a file that is damaged, NeedsBase where the weights that it is read against are not given,
    WrongBase where these cannot be they.
    """
    total: dict[str, TensorDelta] = {}
    kept: dict[str, dict[str, TensorDelta]] = {part.where: {} for part in _to_keep(parts)}
    for name in sorted(set().union(*(part.names for part in parts))):
        for part, change in _changes(name, parts, weights):
            total[name] = total[name] + change if name in total else change
            if part.where in kept:
                kept[part.where][name] = change
    return Delta(total), {where: Delta(own) for where, own in kept.items()}


def _changes(name: str, parts: Sequence[Part], weights: Mapping[str, Any] | None) -> Iterator[tuple[Part, TensorDelta]]:
    """What each part does to one tensor, in order. Its old bits are kept up only as far as a later part needs them."""
    needing = [number for number, part in enumerate(parts) if part.needs(name)]
    old = _old(name, parts[needing[0]], weights) if needing else None
    for number, part in enumerate(parts):
        try:
            change = part.tensor(name, old)
        except WrongBase as error:
            raise WrongBase(f"{part.where}: {error}") from None
        if change is None:
            continue
        if old is not None and number < needing[-1]:
            old = _moved(old, change)
        yield part, change


def _old(name: str, part: Part, weights: Mapping[str, Any] | None) -> Bits:
    if weights is None:
        raise NeedsBase(
            f'{part.where} is of codec "class", which is read against the weights before it: pass them as weights=, or '
            "begin at an anchor"
        )
    return as_bits(weights[name])


def _moved(bits: Bits, change: TensorDelta) -> Bits:
    """The bits after a change, in memory of their own."""
    own = bits.copy()
    change.apply_(own.data)
    return own


def _to_keep(parts: Sequence[Part]) -> Iterator[Part]:
    left = HELD
    for part in reversed(parts):
        left -= part.nbytes if part.needed else 0
        if part.needed and left >= 0:
            yield part
