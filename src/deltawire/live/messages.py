"""What a follower asks one worker, and what the worker answers, as frozen records. `rpc` says which answers which.

In JSON a record is an object; fields that a reader does not know are ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from deltawire.live.boxes import LiveBox, is_inside
from deltawire.live.lease import Holder, View
from deltawire.runlog.records import Position
from deltawire.weights.boxes import Box

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{1,16}$")]
"""a digest"""
Size = Annotated[int, msgspec.Meta(ge=0)]
"""rows or columns"""


# What is asked.


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every request may carry. The answer repeats `nonce`. `lease` is the token of the follower that drives the
    server. `protocol` and `deltawire` say how the asker speaks; a call by hand leaves them out."""

    nonce: str | None = None
    lease: str | None = None
    protocol: int | None = None
    deltawire: str | None = None


class Attach(Request, frozen=True):
    """Attach to a bucket. `trusted` are the public keys to trust from here on. `settings` of the environment say where
    the bucket's store is. `base` is a folder of the worker's host with the base checkpoint of the run."""

    bucket: str
    trusted: tuple[str, ...] = ()
    settings: dict[str, str] = {}
    base: str | None = None


class Update(Request, frozen=True):
    """Write a version. `root` is the digest to which a follower found all workers together to lead."""

    bucket: str
    version: int
    root: str | None = None


class Take(Request, frozen=True):
    """Take the lease for a follower, unless something happened to it since `turn` (None: whatever happened)."""

    token: str
    holder: Holder
    turn: int | None


class SetPosition(Request, frozen=True):
    """The version that the digests of all workers, taken together, are; None when they are no committed one."""

    position: Position | None


class Stage(Request, frozen=True):
    """Prepare a version of a bucket."""

    bucket: str
    version: int


class SeeEnviron(Request, frozen=True):
    """What decides whether a bucket's store is reached from the worker's process."""

    bucket: str


class AuditJob(msgspec.Struct, frozen=True, tag="audit"):
    """Digest all of live memory. `bucket` compares with another bucket than the one attached."""

    bucket: str | None = None


class DriftJob(msgspec.Struct, frozen=True, tag="drift"):
    """Find which of these tensors hold something else than the worker's updates left there."""

    names: list[str]


class Begin(Request, frozen=True):
    """Start a job that takes long. `ticket` is the asker's word for it; the same ticket begins it once."""

    ticket: str
    job: AuditJob | DriftJob


class FetchResult(Request, frozen=True):
    """What the job of a ticket found."""

    ticket: str


# What is answered.


class Refusal(msgspec.Struct, frozen=True, tag="refused"):
    """Why a worker did not do what it was asked: an error's type and message."""

    kind: str
    message: str


class Envelope(msgspec.Struct, frozen=True):
    """What every answer says, besides: which worker gave it, whether a weight update was started there and not
    finished, and how the worker speaks."""

    rank: int
    session_open: bool


class Done(msgspec.Struct, frozen=True):
    """It is done, and there is nothing to report."""


class Problem(msgspec.Struct, frozen=True):
    """The newest failure of a worker: an error's type and message, and what it was doing."""

    kind: str
    message: str
    doing: str


class Staged(msgspec.Struct, frozen=True):
    """What a worker has ready to be written."""

    version: int


class Applied(msgspec.Struct, frozen=True):
    """The newest update that a worker wrote. `from_version` is None when it started from an anchor. `changed` counts
    elements of the parts that it holds; `created` is the publisher's clock, in seconds since the epoch."""

    run: str
    version: int
    from_version: int | None
    changed: int
    wire_bytes: int
    created: float
    fetch_s: float
    stage_s: float
    write_ms: float


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself.

    `attached` is the bucket that it is attached to, `run` that bucket's run. `position` is the version that it serves,
    None while that is no committed one; `joined` says whether that is known. `error` is the newest failure, None after
    a success. `fetching` tells how many bytes of an anchor are there, and of how many, while one is being fetched.

    `doing` is what keeps a thread of its own busy, for `doing_s` seconds so far; the server generates meanwhile.
    `reading` is the bucket that this reads for a follower. `trusted` are public keys, and `base` a folder with the
    run's base checkpoint, that some follower gave. They are kept until another gives others or the server ends.

    `codecs` are those of runs that it can be moved by; none while it is attached to no bucket. `class` is among them
    where it holds tensors whole. Where it does not, `cuts` say which tiles it reads `class` by (`runlog.cuts`); None
    for no tiles. `rank` and `session_open` are its server's to say.
    """

    attached: str | None
    run: str | None
    position: Position | None
    joined: bool
    staging: bool
    staged: Staged | None
    applied: Applied | None
    quarantined: bool
    error: Problem | None
    rank: int = 0
    session_open: bool = False
    fetching: tuple[int, int] | None = None
    lease: View = View()
    trusted: tuple[str, ...] = ()
    base: str | None = None
    doing: str | None = None
    reading: str | None = None
    doing_s: float = 0.0
    codecs: tuple[str, ...] = ()
    cuts: dict[str, tuple[Size, Size]] | None = None


class Accepted(msgspec.Struct, frozen=True):
    """Whether a worker does what it was asked to."""

    accepted: bool


class Taken(msgspec.Struct, frozen=True):
    """Whether a worker gave the lease to the follower that asked for it."""

    taken: bool


class Reverted(msgspec.Struct, frozen=True):
    """Whether a worker took its last update back; it may have been confirmed, or there was none."""

    reverted: bool


class Environ(msgspec.Struct, frozen=True):
    """What decides whether a worker's process reaches a store: see `environment.seen`."""

    environ: dict[str, str]
    pid: int


class Digested(msgspec.Struct, frozen=True):
    """The digest of every part that a worker holds, by name of the tensor."""

    digests: dict[str, list[Hex]]

    @property
    def values(self) -> dict[str, list[int]]:
        """The digests as numbers."""
        return {name: [int(value, 16) for value in digests] for name, digests in self.digests.items()}


class HeldParts(Digested, frozen=True):
    """Which parts of which tensors a worker holds, too; `sizes` are the elements of every tensor, wherever it is, and
    `frozen` the committed digests of those that the run never changes and it holds nothing of."""

    sizes: dict[str, int]
    parts: dict[str, list[Box]]
    frozen: dict[str, Hex]

    def __post_init__(self) -> None:
        require_digests(self.parts, self.digests)
        for name, parts in self.parts.items():
            if not all(is_inside(part, self.sizes.get(name, 0)) for part in parts):
                raise ValueError(f"a part of {name} is not in it")


class Audited(HeldParts, frozen=True, tag="audited"):
    """What a worker found when it digested all of its memory. `promised` are whole tensors' digests at its version, and
    `drifted` names what changed since its last update."""

    position: Position | None
    promised: dict[str, Hex]
    drifted: list[str]


class Drifted(msgspec.Struct, frozen=True, tag="drifted"):
    """Tensors that hold something else than a worker's updates left there."""

    drifted: list[str]


class Outcome(msgspec.Struct, frozen=True):
    """Whether a job is done, and then what it found."""

    done: bool
    found: Audited | Drifted | Refusal | None = None

    def __post_init__(self) -> None:
        if self.done != (self.found is not None):
            raise ValueError("a job is done when it found something")


class Placed(msgspec.Struct, frozen=True):
    """Where each tensor lives in a worker, the frozen ones that it holds nothing of, and the modules whose weights are
    remade at an update. `rank` is its server's to say."""

    placement: dict[str, list[LiveBox]]
    frozen: list[str]
    remade: list[str]
    rank: int = 0


def require_digests(parts: Mapping[str, Sequence[Box]], digests: Mapping[str, Sequence[object]]) -> None:
    """Raise ValueError unless there is a digest for each part."""
    for name, held in parts.items():
        if len(digests.get(name, ())) != len(held):
            raise ValueError(f"{len(held)} parts of {name} and {len(digests.get(name, ()))} digests")
