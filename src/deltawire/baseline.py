"""What the trainer last captured, bit for bit: the copy that new weights are compared with.

It costs two bytes of host memory per bf16 element. It is scratch: after a crash it is rebuilt from the last commit,
never trusted.
"""

from collections.abc import Iterable, Mapping

from deltawire.bits import Bits
from deltawire.delta import TensorDelta, between_bits
from deltawire.digest import digest_bits, moved
from deltawire.errors import ShapeMismatch, UnknownTensor
from deltawire.manifests import TensorEntry
from deltawire.names import closest


class Baseline:
    """The weights last captured and their digests, which every capture moves together in O(changed)."""

    def __init__(self) -> None:
        self._weights: dict[str, Bits] = {}
        self.digests: dict[str, int] = {}

    def __getitem__(self, name: str) -> Bits:
        return self._weights[name]

    def __len__(self) -> int:
        return len(self._weights)

    def seed(self, name: str, bits: Bits) -> None:
        """Take a tensor as captured, in memory of our own."""
        self._weights[name] = bits.copy()
        self.digests[name] = digest_bits(self._weights[name].data)

    def as_mapping(self) -> Mapping[str, Bits]:
        """The weights, name -> Bits; shared memory, not to be written."""
        return self._weights

    def compare(self, name: str, new: Bits) -> TensorDelta:
        """The change since the last capture. Raises UnknownTensor, ShapeMismatch, DtypeMismatch."""
        self.require(name, new.shape)
        return between_bits(self._weights[name], new)

    def advance(self, name: str, change: TensorDelta) -> None:
        """Move the baseline and its digest by a change. The caller owns the change from here on: it is nowhere else."""
        before, after = change.apply_(self._weights[name].data)
        self.digests[name] = moved(self.digests[name], before, after)

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UnknownTensor or ShapeMismatch unless there is such a tensor of this shape."""
        old = self._weights.get(name)
        if old is None:
            raise UnknownTensor(
                f"{name!r} is not in this run's tensor table; closest there: {closest(name, self._weights)}"
            )
        if shape != old.shape:
            raise ShapeMismatch(f"{name}: shape {list(shape)}, but this run has {list(old.shape)}")

    def table(self, trainable: Iterable[str]) -> tuple[TensorEntry, ...]:
        """The tensor table in the order of seeding."""
        names = frozenset(trainable)
        return tuple(TensorEntry(name, bits.dtype, bits.shape, name in names) for name, bits in self._weights.items())
