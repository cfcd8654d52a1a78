"""The facts of one tensor: as a run's table lists it, and as a delta file's header states it."""

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
