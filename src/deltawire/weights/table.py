"""The facts of one tensor: as a run's table lists it, and as a delta file's header states it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from deltawire.weights.bits import WIDTHS, count


class TensorEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor of the run's table: canonical checkpoint name, the dtype the server holds, and shape.

    `trainable` says whether the trainer publishes it; a frozen tensor stays as the base has it. `aliases` are further
    names of the same storage, as a tied head has them. They are never names of tensors in the table.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    trainable: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return count(self.shape) * WIDTHS[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a delta file's header says about one changed tensor. `changed` counts its elements that change."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed: int

    @property
    def total(self) -> int:
        """Elements in the tensor."""
        return count(self.shape)


def aliases_of(table: Iterable[TensorEntry]) -> dict[str, str]:
    """Canonical name by alias."""
    return {alias: entry.name for entry in table for alias in entry.aliases}


def with_aliases(table: Iterable[TensorEntry], aliases: Mapping[str, str]) -> tuple[TensorEntry, ...]:
    """The table with each tensor's further names, and without entries of their own for those; canonical name by alias
    is given."""
    listed = {name: tuple(sorted(alias for alias in aliases if aliases[alias] == name)) for name in aliases.values()}
    kept = (entry for entry in table if entry.name not in aliases)
    return tuple(msgspec.structs.replace(entry, aliases=listed.get(entry.name, ())) for entry in kept)
