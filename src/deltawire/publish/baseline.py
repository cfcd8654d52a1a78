"""What the trainer last captured, bit for bit: the copy that new weights are compared with.

It costs two bytes of host memory per bf16 element. It is scratch: after a crash it is rebuilt from the last commit,
never trusted.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deltawire.errors import CopiesDiffer, ShapeMismatch, UnknownTensor, some
from deltawire.prepare.names import bare, closest, is_adapters, require_bare
from deltawire.publish.sharded.boxes import Box
from deltawire.weights.bits import Bits
from deltawire.weights.delta import TensorDelta, between_bits
from deltawire.weights.digest import digest_bits, moved
from deltawire.weights.table import TensorEntry


class Transition:
    """Statements that only together take the state from one that agrees with itself to the next: `with transition: …`,
    or from `begin` to `end`. An exception in between, which a signal's handler may raise anywhere, leaves the state
    `unfinished` for good."""

    def __init__(self) -> None:
        self._open = 0

    @property
    def unfinished(self) -> bool:
        """Whether some of the statements may have been done, and others not."""
        return self._open > 0

    def begin(self) -> None:
        """Say so before the first of the statements."""
        self._open += 1

    def end(self) -> None:
        """Say so after the last."""
        self._open -= 1

    __enter__ = begin

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()


class Baseline:
    """The weights last captured and their digests, which every capture moves together in O(changed).

    A rank of a sharded job seeds the boxes it holds; shapes and positions then are those inside a box, and digests the
    part that the box has in its tensor's.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Bits] = {}
        self.boxes: dict[str, Box] = {}
        self.digests: dict[str, int] = {}

    def __getitem__(self, name: str) -> Bits:
        return self._weights[name]

    def __len__(self) -> int:
        return len(self._weights)

    def seed(self, name: str, bits: Bits, box: Box | None = None) -> None:
        """Take a tensor, or a box of one, as captured, in memory of our own."""
        own = bits.copy()  # what is given may be written meanwhile, and the digest is that of what we hold
        self._weights[name] = own
        if box is not None:
            self.boxes[name] = box
        self.digests[name] = digest_bits(own.data) if box is None else box.digest(own.data)

    def forget(self, name: str) -> None:
        """Let go of a tensor, as if it had never been seeded."""
        for kept in (self._weights, self.boxes, self.digests):
            kept.pop(name, None)

    def require_alike(self, alias: str, name: str, bits: Bits) -> None:
        """Raise CopiesDiffer unless what a publish gave of tensor `name` under a second name is the same."""
        if bits != self._weights[name]:
            raise CopiesDiffer(
                f"{alias} is another name of {name} in this run, because the two are tied, and this publish gave them "
                "different bits. Tie them again by model.tie_weights(), or set tie_word_embeddings to false in the "
                'config and begin a run of two tensors: another bucket, or Publisher(run="supersede")'
            )

    def rename(self, old: str, new: str) -> None:
        """Hold a tensor under another name."""
        self._weights[new], self.digests[new] = self._weights.pop(old), self.digests.pop(old)
        if old in self.boxes:
            self.boxes[new] = self.boxes.pop(old)

    def as_mapping(self) -> Mapping[str, Bits]:
        """The weights, name -> Bits; shared memory, not to be written."""
        return self._weights

    def compare(self, name: str, new: Bits) -> TensorDelta:
        """The change since the last capture. Raises UnknownTensor, ShapeMismatch, DtypeMismatch."""
        self.require(name, new.shape)
        return between_bits(self._weights[name], new)

    def advance(self, name: str, change: TensorDelta) -> None:
        """Move the baseline and its digest by a change. The caller owns the change from here on: it is nowhere else."""
        data, box = self._weights[name].data, self.boxes.get(name)
        before, after = change.apply_(data) if box is None else box.apply_(data, change)
        self.digests[name] = moved(self.digests[name], before, after)

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UnknownTensor or ShapeMismatch unless there is such a tensor of this shape."""
        require(name, shape, self._weights)

    def holds_alike(self, one: str, other: str) -> bool:
        """Whether two tensors, or what is held of them, have the same bits; true of one that is not held by itself."""
        return not {one, other} <= self._weights.keys() or self._weights[one] == self._weights[other]

    def table(self, trainable: Iterable[str]) -> tuple[TensorEntry, ...]:
        """The tensor table in the order of seeding."""
        names = frozenset(trainable)
        return tuple(TensorEntry(name, bits.dtype, bits.shape, name in names) for name, bits in self._weights.items())


def among(
    pairs: Iterable[tuple[str, Any]], table: Mapping[str, Bits] | Mapping[str, TensorEntry]
) -> Iterator[tuple[str, Any]]:
    """The pairs whose names the table has. Raises UnknownTensor for all others at once, at the end."""
    unknown = []
    for name, tensor in pairs:
        if name in table:
            yield name, tensor
        else:
            unknown.append(name)
    if unknown:
        require_bare(name for name in unknown if not is_adapters(name) and bare(name) in table)
        raise foreign(unknown, table)


def foreign(names: list[str], table: Iterable[str]) -> UnknownTensor:
    """The error for tensors that a run does not have."""
    are, to = ("is", "") if len(names) == 1 else ("are", " to the first")
    near = closest(names[0], table)
    return UnknownTensor(
        f"{some(map(repr, names))} {are} not in this run's tensor table; closest there{to}: {near}. Leave out what is "
        "not to be published by Publisher(prepare=[…]), or begin a run of other tensors: another "
        'bucket, or Publisher(run="supersede")'
    )


def require(name: str, shape: tuple[int, ...], table: Mapping[str, Bits] | Mapping[str, TensorEntry]) -> None:
    """Raise UnknownTensor or ShapeMismatch unless the table has such a tensor of this shape."""
    if name not in table:
        raise foreign([name], table)
    if shape != table[name].shape:
        raise ShapeMismatch(
            f"{name}: shape {list(shape)}, but this run has {list(table[name].shape)}; another model begins a run of "
            'its own: another bucket, or Publisher(run="supersede")'
        )
