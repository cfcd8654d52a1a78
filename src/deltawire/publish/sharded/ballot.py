"""What every rank says of a publish, added up over all ranks in one sum: the only thing that ranks exchange for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from deltawire.errors import BadDigest, CopiesDiffer, MissingTensor
from deltawire.publish.sharded.ranks import Sums
from deltawire.publish.sharded.shards import Shard
from deltawire.publish.ties import Ties
from deltawire.publish.tracker import ChangeTracker
from deltawire.weights.digest import MODULUS
from deltawire.weights.table import TensorEntry


@dataclass(frozen=True, slots=True, eq=False)
class Ballot:
    """One rank's say, or that of all ranks once packed ballots are added up.

    `marks` has a number for each rank. The others have one for each tensor. `seeded` and `owned` are digests of what a
    rank publishes, at the opening and now; `copies` are of all that it holds. `cut` is rank 0's, and -1 on others.
    """

    marks: Sums
    changed: int
    wire_bytes: int
    cut: int
    seeded: Sums
    owned: Sums
    copies: Sums

    @classmethod
    def blank(cls, ranks: int, tensors: int) -> "Ballot":
        """A ballot that says nothing, as of a rank that has a problem."""
        return cls.unpack(np.zeros(ranks + 3 + 3 * tensors, np.uint64), ranks, tensors)

    @classmethod
    def unpack(cls, numbers: Sums, ranks: int, tensors: int) -> "Ballot":
        """A ballot from its numbers."""
        changed, wire_bytes, cut = (int(number) for number in numbers[ranks : ranks + 3])
        seeded, owned, copies = numbers[ranks + 3 :].reshape(3, tensors)
        return cls(numbers[:ranks], changed, wire_bytes, cut - 1, seeded, owned, copies)

    def pack(self) -> Sums:
        """The same as numbers that add up over ranks."""
        facts = np.array([self.changed, self.wire_bytes, self.cut + 1], np.uint64)
        packed: Sums = np.concatenate([self.marks, facts, self.seeded, self.owned, self.copies])
        return packed

    def require_whole(
        self, due: Iterable[str | None], shards: Mapping[str, Shard], known: Mapping[str, int], *, where: str
    ) -> None:
        """Check an added-up ballot: the owned parts tile every tensor given, and all copies of a part agree.

        `due` has a name for each tensor of the ballot, None for one that was not given. `known` are the digests at the
        opening, and `where` names that place. Raises BadDigest, CopiesDiffer: the same on every rank.
        """
        for number, name in enumerate(due):
            if name is None:
                continue
            if int(self.seeded[number]) != known[name]:
                raise BadDigest(
                    f"{name}: the shards of all ranks do not make the tensor that {where} has; was it altered "
                    "since, or is the tensor on only some of the ranks?"
                )
            if int(self.copies[number]) != int(self.owned[number]) * shards[name].copies % MODULUS:
                raise CopiesDiffer(f"{name}: ranks that hold copies of the same elements hold different bits")


def numbers(values: Iterable[int]) -> Sums:
    """Numbers below 2^64 as an array that adds up over ranks."""
    return np.array([*values], np.uint64)


def digests_of(tracker: ChangeTracker, table: Iterable[str], names: set[str]) -> tuple[Sums, Sums, Sums]:
    """For each tensor of a table, the digests of what a rank publishes of it, at the opening and now, and of all that
    it holds; 0 for one that is not among these names."""
    order, digests = [*table], tracker.baseline.digests
    ours = {name for name in names if tracker.shards[name].owned}
    return (
        numbers(tracker.seeded[name] if name in ours else 0 for name in order),
        numbers(digests[name] if name in ours else 0 for name in order),
        numbers(digests[name] if name in names else 0 for name in order),
    )


def mark(table: Mapping[str, TensorEntry], given: set[str], aliases: Ties, step: int | None) -> int:
    """A number that differs where a rank was given other tensors, or another step, than the others.

    Another step shows a publish too many, after which ranks would send different policies as one.
    """
    facts = "".join(f"{entry.name}\0{entry.dtype}\0{entry.shape}\n" for entry in table.values())
    said = f"{facts}\0{sorted(given)}\0{sorted(aliases.items())}\0{step}".encode()
    return int.from_bytes(blake3(said).digest()[:8], "little")


def marks_of(rank: int, ranks: int, number: int) -> Sums:
    """One rank's mark in its own place, zero in the places of the others."""
    marks = np.zeros(ranks, np.uint64)
    marks[rank] = number
    return marks


def require_alike(marks: Sums) -> None:
    """Raise MissingTensor unless every rank has the mark of rank 0."""
    if other := [rank for rank, number in enumerate(marks) if number != marks[0]]:
        raise MissingTensor(
            f"rank {', '.join(map(str, other))} gave other tensors (names, order, dtypes or shapes) or "
            "another step than rank 0. Every rank makes the same calls, for its shards of one model"
        )
