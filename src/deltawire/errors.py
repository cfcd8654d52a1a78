"""What went wrong, as a tree a caller can branch on: retry Unavailable, resync on a ChainError, stop on an ApplyError.

DeltaWireError
  BucketError       the store
    NotFound          no such key, bucket or host directory
    AlreadyExists     put_new found the key taken
    Unavailable       no answer, or an answer that says "later": the only one worth retrying
    AccessRefused     the store knows us and says no, or does not know our token
    OutOfSpace        the disk, or the store's quota, is full
    NotOffered        the store has no such operation
    BadUrl            not an address of a bucket
  FormatError       these bytes are not a file we accept
    Truncated         shorter than it says it is
    BadDigest         the bytes or the weights do not hash to what was promised
    BadSignature      not signed, or not by a key we trust
    UnknownVersion    a format version or codec this deltawire does not know
    TooLarge          a size beyond the stated bound, refused before any memory is spent on it
    NeedsBase         this codec is decoded against the old weights, and none were given
  ChainError        sound files that do not join                -> resync from an anchor
    Gap               no commit continues from where this copy stands
    Forked            two commits claim the same place
    OtherRun          the bucket moved to a run that does not continue ours
    RolledBack        the newest signed version is older than one seen, or of another run
  ApplyError        the weights refused                         -> stop, ask a person
    UnknownTensor     a name that is not in the tensor table
    MissingTensor     a name of the trainable set that was not given
    ShapeMismatch     another shape than the table's
    DtypeMismatch     another dtype than the table's, and no exact cast
    CopiesDiffer      ranks that hold the same elements, or names of one tied tensor, hold different bits
    ConcurrentWrite   the weights were written while they were read
    WrongBase         the weights are not the version this delta continues from
    NoView            a checkpoint tensor is no rectangle of the trainer's
  RankFailed        another rank of a sharded job failed, or is gone
  EngineError       the inference server
    EngineUnavailable   it does not answer
    BadAnswer           what it answers is no answer to what was asked
    EngineUnsupported   it lacks the plugin, its weight endpoints, or a layout we can prove right
      OtherProtocol       it runs a deltawire that speaks otherwise
    Quarantined         it can no longer say what it serves; restart it
    AnotherFollower     another follower drives it
    NotServed           nobody serves a published version in time; it is safe in the bucket
  BrokenInvariant   deltawire contradicts itself               -> stop, report it
"""

from collections.abc import Iterable, Mapping
from typing import Any

NAMED = 3
"""names that an error lists before it only counts"""


class DeltaWireError(Exception):
    """Everything deltawire raises on purpose."""


class BucketError(DeltaWireError):
    """The store did not do what was asked."""


class NotFound(BucketError):
    """There is no such key, bucket or directory."""


class AlreadyExists(BucketError):
    """`put_new` found the key taken."""


class Unavailable(BucketError):
    """No answer, or one that says "later". The only error worth retrying."""


class AccessRefused(BucketError):
    """The store refused the token, or the token may not do this."""


class OutOfSpace(BucketError):
    """The disk or the store's quota is full."""


class NotOffered(BucketError):
    """The store has no such operation, or not under this condition (HTTP 501)."""


class BadUrl(BucketError):
    """This is not the address of a bucket."""


class FormatError(DeltaWireError):
    """These bytes are not a file we accept."""


class Truncated(FormatError):
    """The file is shorter than it says it is."""


class BadDigest(FormatError):
    """Bytes or weights do not hash to what was promised."""


class BadSignature(FormatError):
    """A record is not signed, or not by a key we trust."""


class UnknownVersion(FormatError):
    """A format version or codec this deltawire does not know."""


class TooLarge(FormatError):
    """A size beyond the stated bound."""


class NeedsBase(FormatError):
    """This codec is decoded against the old weights, and none were given."""


class ChainError(DeltaWireError):
    """Sound files that do not join; resync from an anchor."""


class Gap(ChainError):
    """No commit continues from where this copy stands."""


class Forked(ChainError):
    """Two commits claim the same place in the chain."""


class OtherRun(ChainError):
    """The bucket moved to a run that does not continue ours."""


class RolledBack(ChainError):
    """The newest signed version is older than one that was seen before, on another branch, or of another run."""


class ApplyError(DeltaWireError):
    """The weights refused the change; a person has to look."""


class UnknownTensor(ApplyError):
    """A name that is not in the tensor table."""


class MissingTensor(ApplyError):
    """A name of the trainable set that was not given."""


class ShapeMismatch(ApplyError):
    """Another shape than the tensor table's."""


class DtypeMismatch(ApplyError):
    """Another dtype than the tensor table's, and no exact cast between them."""


class CopiesDiffer(ApplyError):
    """Ranks that hold copies of the same elements, or the names of one tied tensor, hold different bits."""


class ConcurrentWrite(ApplyError):
    """Another stream or thread wrote the weights while they were read."""


class WrongBase(ApplyError):
    """The weights are not the version this delta continues from."""


class NoView(ApplyError):
    """A checkpoint tensor that is computed from the trainer's tensors, so none of them can be seen as it."""


class RankFailed(DeltaWireError):
    """Another rank of a sharded job failed and says why itself, or is gone."""


class EngineError(DeltaWireError):
    """The inference server did not do what was asked."""


class EngineUnavailable(EngineError):
    """The inference server does not answer."""


class BadAnswer(EngineError):
    """What came back is no answer to what was asked: not JSON, or a field is missing or of another type."""


class EngineUnsupported(EngineError):
    """The server lacks the plugin, its weight endpoints, or a layout we can prove right."""


class OtherProtocol(EngineUnsupported):
    """The server's workers run a deltawire that speaks another protocol than the follower's."""


class Quarantined(EngineError):
    """The server can no longer say what it serves; restart it."""


class AnotherFollower(EngineError):
    """Another follower drives the server: two would flip its weights between them."""


class NotServed(EngineError):
    """No replica served a published version in time. The version is committed: look at the followers, or wait on."""


class BrokenInvariant(DeltaWireError):
    """What deltawire holds contradicts itself. It stops before it writes more; please report it."""


def some(names: Iterable[str]) -> str:
    """Three of these names, and how many more there are: "a, b, c and 4 more"."""
    listed = list(names)
    more = f" and {len(listed) - NAMED:,} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def error_text(error: BaseException) -> str:
    """An error's type and what it says, as one line for people and records."""
    return f"{type(error).__name__}: {error}"


DAMAGE = (FormatError, ChainError, ApplyError, NotFound)
"""what reading a record or its payload raises where it is damaged, gone, or a stranger's: there may be another way"""


_BY_NAME = {
    name: kind for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, DeltaWireError)
}
"""the tree, by the names of its types"""


def error_from_kind(kind: str, message: str) -> DeltaWireError | None:
    """The error that another process reports by its type's name; None for a name that is not in this tree."""
    found = _BY_NAME.get(kind)
    return None if found is None else found(message)


def recorded_error(record: Mapping[str, Any]) -> DeltaWireError:
    """The typed error that another process recorded as its type's name (`kind`) and `message`. EngineError for a name
    that is not in this tree."""
    kind, message = str(record.get("kind")), str(record.get("message", "the worker gave no reason"))
    return error_from_kind(kind, message) or EngineError(f"{kind}: {message}")
