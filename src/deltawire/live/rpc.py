"""What a worker answers when it is asked something, as typed records. Anything else is one error: BadAnswer."""

from collections.abc import Mapping, Sequence
from typing import Annotated, TypedDict, TypeVar

import msgspec

from deltawire.errors import BadAnswer
from deltawire.live.boxes import Box, Part
from deltawire.runlog.records import Position

T = TypeVar("T")
SHOWN = 200
"""characters of a wrong answer that its error repeats"""
Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{1,16}$")]
"""a digest"""


def converted(answer: object, kind: type[T], asked: str) -> T:
    """An answer that was JSON as what it should be. Raises BadAnswer."""
    try:
        return msgspec.convert(answer, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise bad_answer(asked, error, repr(answer).encode()) from None


def bad_answer(asked: str, error: Exception, came: bytes) -> BadAnswer:
    """The error for an answer that is not the record `asked` should get."""
    shown = ascii(came[:SHOWN].decode(errors="replace"))
    return BadAnswer(f"{asked} got no answer that vLLM gives ({error}); it was {shown}: does vLLM listen there?")


class Refusal(msgspec.Struct, frozen=True):
    """Why a worker did not do what it was asked: an error's type and message."""

    kind: str
    message: str


class Problem(TypedDict):
    """The newest failure of a worker: an error's type and message, and what it was doing."""

    kind: str
    message: str
    doing: str


class Staged(TypedDict):
    """What a worker has ready to be written."""

    version: int


class Applied(TypedDict):
    """The newest update that a worker wrote. `from_version` is None when it started from an anchor; `created` is the
    publisher's clock, in seconds since the epoch."""

    run: str
    version: int
    from_version: int | None
    changed: int
    wire_bytes: int
    created: float
    fetch_s: float
    stage_s: float
    write_ms: float


class Worker(msgspec.Struct, frozen=True):
    """What every answer of a worker says, besides: which worker it is."""

    rank: int


class Accepted(msgspec.Struct, frozen=True):
    """Whether a worker does what it was asked to."""

    accepted: bool


class Finished(msgspec.Struct, frozen=True):
    """Whether a worker has the answer to what takes long; then the answer is beside."""

    done: bool


class Taken(msgspec.Struct, frozen=True):
    """Whether a worker gave the lease to who asked for it."""

    taken: bool


class Environ(msgspec.Struct, frozen=True):
    """What decides whether a worker's process reaches a store: see `environment.seen`."""

    environ: dict[str, str]
    pid: int


class Blamed(msgspec.Struct, frozen=True):
    """Tensors that hold something else than a worker's updates left there."""

    drifted: list[str]


class Digested(msgspec.Struct, frozen=True):
    """The digest of every part that a worker holds, by name of the tensor."""

    digests: dict[str, list[Hex]]

    @property
    def values(self) -> dict[str, list[int]]:
        """The digests as numbers."""
        return {name: [int(value, 16) for value in digests] for name, digests in self.digests.items()}


class Holding(Digested, frozen=True):
    """Which parts of which tensors a worker holds, too; `sizes` are the elements of every tensor, wherever it is, and
    `frozen` the committed digests of those that the run never changes and it holds nothing of."""

    sizes: dict[str, int]
    parts: dict[str, list[Part]]
    frozen: dict[str, Hex]

    def __post_init__(self) -> None:
        require_digests(self.parts, self.digests)
        for name, parts in self.parts.items():
            if not all(_inside(part, self.sizes.get(name, 0)) for part in parts):
                raise ValueError(f"a part of {name} is not in it")


class Audited(Holding, frozen=True):
    """What a worker found when it digested all of its memory: `promised` are whole tensors' digests of the version it
    stands at, `drifted` names what its updates did not leave so."""

    position: Position | None
    promised: dict[str, Hex]
    drifted: list[str]


class Placed(msgspec.Struct, frozen=True):
    """Where each tensor lives in a worker, the frozen ones it holds nothing of, and the modules whose weights are made
    anew at an update."""

    placement: dict[str, list[Box]]
    frozen: list[str]
    remade: list[str]


def require_digests(parts: Mapping[str, Sequence[Part]], digests: Mapping[str, Sequence[object]]) -> None:
    """Raise ValueError unless there is a digest for each part."""
    for name, held in parts.items():
        if len(digests.get(name, ())) != len(held):
            raise ValueError(f"{len(held)} parts of {name} and {len(digests.get(name, ()))} digests")


def _inside(part: Part, size: int) -> bool:
    """Whether every element of a rectangle is one of a tensor's."""
    offset, shape, strides = part
    if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
        return False
    if 0 in shape:
        return True
    return offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) < size
