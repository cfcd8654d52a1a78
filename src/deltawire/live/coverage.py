"""What several workers hold, as one model: every element somewhere, every copy equal, each counted once."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deltawire.errors import BadDigest, WrongBase, some
from deltawire.live.boxes import refuse
from deltawire.runlog.records import Position
from deltawire.weights.boxes import Box
from deltawire.weights.digest import MODULUS

Parts = Mapping[str, Sequence[Box]]
Digests = Mapping[str, Sequence[int]]
"""by name, the digest of each part that a worker holds"""


class Held(NamedTuple):
    """A worker that holds a part, and the number of that part among its own of the tensor."""

    rank: int
    number: int


class WholeDigests(NamedTuple):
    """Digests of whole tensors, put together from several workers, and the names whose copies differ."""

    digests: dict[str, int]
    differing: list[str]


class Coverage:
    """The parts of a run's tensors that the workers of one server hold, in the order of their ranks; `sizes` are the
    tensors' elements.

    `frozen` are the committed digests of tensors that the run never changes: one that no worker loads counts with its
    digest. Raises EngineUnsupported, naming each tensor that has missing elements, or parts that overlap without being
    copies. `hints` says what happened to some of them.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        workers: Sequence[Parts],
        hints: Mapping[str, str] = {},
        frozen: Mapping[str, int] = {},
    ) -> None:
        self._copies: dict[str, list[list[Held]]] = {}
        loaded = {tensor for parts in workers for tensor, held in parts.items() if held}
        self._left = {name: digest for name, digest in frozen.items() if name not in loaded}
        faults: dict[str, str] = {}
        for tensor, size in sizes.items():
            copies: dict[Box, list[Held]] = {}
            for rank, parts in enumerate(workers):
                for index, part in enumerate(parts.get(tensor, ())):
                    copies.setdefault(part, []).append(Held(rank, index))
            self._copies[tensor] = list(copies.values())
            if tensor in self._left:
                continue
            if reason := _fault(size, list(copies)):
                faults[tensor] = hints.get(tensor, reason)
        refuse(faults)

    def digests(self, workers: Sequence[Digests]) -> WholeDigests:
        """Every tensor's digest, of each copied part the first worker's; and the names whose copies differ."""
        totals: dict[str, int] = {}
        differing: list[str] = []
        for name, parts in self._copies.items():
            values = [[workers[held.rank][name][held.number] for held in copies] for copies in parts]
            if any(len(set(value)) > 1 for value in values):
                differing.append(name)
            totals[name] = sum(value[0] for value in values) % MODULUS
        return WholeDigests(totals | self._left, differing)

    @property
    def left_out(self) -> list[str]:
        """The frozen tensors that no worker loads: their digests are the commit's, of no memory."""
        return list(self._left)


def disagreement(target: Position, wrong: list[str], drifted: list[str]) -> WrongBase | BadDigest:
    """The error for an update after which tensors would not be what the commit promises."""
    names = f"{len(wrong)} tensors would not match the commit: {some(wrong)}"
    if drifted:
        return WrongBase(f"{target}: {names}; something else wrote to {some(drifted)}: they are remade")
    return BadDigest(f"{target}: {names}; the live weights are sound, what was published is not: publish a new run")


_NOT_LOADED = (
    "the model does not load it: is the run of the model that this server loaded? If it is, leave the tensor out of "
    "what is published, by Publisher(prepare=[…])"
)


def _fault(size: int, parts: list[Box]) -> str | None:
    if not parts:
        return _NOT_LOADED if size else None
    covered = sum(part.size for part in parts)
    if covered != size or not (_is_whole(parts[0], size) or _is_disjoint(parts, size)):
        return f"{covered} of its {size} elements arrive, or some arrive twice"
    return None


def _is_whole(part: Box, size: int) -> bool:
    return part.size == size and part in (Box(0, (size,), (1,)), Box(0, (), ()))


def _is_disjoint(parts: list[Box], size: int) -> bool:
    seen = np.zeros(size, bool)
    for part in parts:
        np.lib.stride_tricks.as_strided(seen[part.offset :], part.shape, part.strides)[...] = True
    return bool(seen.all())
