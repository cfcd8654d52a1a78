"""The records a bucket holds beside payloads, as typed JSON: run, commit, derived and head. docs/FORMAT.md §6 specifies
them, §7 their signatures."""

import re
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from blake3 import blake3

from deltawire.buckets.base import is_key
from deltawire.errors import FormatError, UnknownVersion, some
from deltawire.format.container import MAX_RANK
from deltawire.runlog.signing import UNSIGNED, SigningKey, is_public_key
from deltawire.weights.bits import WIDTHS, count
from deltawire.weights.table import TensorEntry, aliases_of

FORMAT = 1
ALIASES = 2
"""format of a run.json whose table lists aliases: a reader that does not know them must refuse it"""
LISTED_CODECS = 3
"""format of a run.json that lists codecs: as above"""
CODECS = ("subset", "class", "gap")
"""what a run's deltas may be written in"""
NEED_WEIGHTS = ("class",)
"""those of them that are written and read against the weights before the delta"""
MAX_RECORD = 64 << 20
"""bytes of the largest run.json or commit accepted (a table of 100,000 tensors is about 12 MB)"""
MAX_HEAD = 64 << 10
"""bytes of the largest HEAD.json accepted"""
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX16 = re.compile(r"[0-9a-f]{16}")
_HEX128 = re.compile(r"[0-9a-f]{128}")
_MAX_VERSION = 1 << 53
"""JSON numbers are exact below it, in every language"""


class Position(msgspec.Struct, frozen=True):
    """Where a copy of the weights stands: which run, which version, and the root of its digests (64 hex digits)."""

    run: str
    version: int
    root: str

    def __str__(self) -> str:
        return f"{self.run}:{self.version}"


class BaseCheckpoint(msgspec.Struct, frozen=True):
    """The checkpoint version 0 refers to: a Hub repository at a revision, or (revision None) a folder."""

    source: str
    revision: str | None = None


class Run(msgspec.Struct, frozen=True):
    """run.json: what is true of every version of a run. `base` None means version 0 is an anchor in the bucket.

    `supersedes` is where the run before it ended; `compactors` are public keys that may sign folds and anchors.
    `codecs` are those that its deltas may be of; a run that lists none is of codec "gap". The first needs no weights:
    folds are of it. `format` is LISTED_CODECS where it lists any, else ALIASES where the table lists an alias, else
    FORMAT.
    """

    run: str
    table: tuple[TensorEntry, ...]
    created: float
    base: BaseCheckpoint | None = None
    supersedes: Position | None = None
    compactors: tuple[str, ...] = ()
    signer: str | None = None
    signature: str | None = None
    format: int = FORMAT
    codecs: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def needs_weights(self) -> bool:
        """Whether some of its deltas may be read against the weights before them."""
        return any(codec in NEED_WEIGHTS for codec in self.may_use)

    @property
    def may_use(self) -> tuple[str, ...]:
        """Codecs that its deltas may be of; the first is what is written where nothing speaks for another."""
        return self.codecs or ("gap",)


class Payload(msgspec.Struct, frozen=True):
    """One object a commit refers to: its key below the run, bytes, and BLAKE3 (64 hex digits)."""

    key: str
    size: int
    blake3: str


class Covering(msgspec.Struct, frozen=True):
    """What the records of a commit, a fold and an anchor say alike: the changes in (parent, version], or with parent
    None a whole version."""

    run: str
    version: int
    parent: int | None
    root: str
    digests: dict[str, str]
    payloads: tuple[Payload, ...]

    @property
    def position(self) -> Position:
        """Where a copy stands that has applied this."""
        return Position(self.run, self.version, self.root)

    @property
    def wire_bytes(self) -> int:
        """Bytes of all payloads."""
        return sum(payload.size for payload in self.payloads)


class Commit(Covering, frozen=True):
    """The record that makes a version exist. It covers (parent, version]; parent None means its payloads are an anchor,
    whole or as changes from all-zero bits (or, without payloads, the run's base).

    `digests` are those of the tensors that changed since the parent, as 16 hex digits; `root` hashes all of them.
    `created` is seconds since the epoch by the publisher's clock, `step` the trainer's own counter. A metric that was
    not finite is read as None: JSON has no NaN. `parent_hash` is the BLAKE3 of the parent's record (of run.json, for
    the first commit), None only in buckets older than the links. `writer` names the process that holds the run, and
    `choice` says to people which codec was chosen, and why.
    """

    created: float
    step: int | None = None
    metrics: dict[str, float | None] = {}
    parent_hash: str | None = None
    writer: str | None = None
    choice: str | msgspec.UnsetType = msgspec.UNSET
    signer: str | None = None
    signature: str | None = None
    format: int = FORMAT


class Derived(Covering, frozen=True):
    """The manifest of a fold (all changes in (parent, version] as one delta) or of an anchor (parent None: a whole
    checkpoint of `version`). Made from commits by a compactor; the same commits make the same bytes.

    `digests` are those at `version` of the tensors a fold changes, or for an anchor of all. `commit_hash` is the BLAKE3
    of the record of commit `version`, `parent_hash` that of commit `parent`: a fold is a link of the same chain.
    """

    commit_hash: str
    parent_hash: str | None = None
    signer: str | None = None
    signature: str | None = None
    format: int = FORMAT


class Head(msgspec.Struct, frozen=True):
    """HEAD.json: a hint, perhaps stale, at the newest commit."""

    run: str
    version: int
    commit: str
    format: int = FORMAT


class Link(msgspec.Struct, frozen=True):
    """One anchor (`start` None), fold or delta on a way: where it leads, the bytes of its payloads, the key of its
    record, and whether it is read against the weights at `start`."""

    start: int | None
    end: int
    size: int
    record: str
    needs_weights: bool | msgspec.UnsetType = msgspec.UNSET


class Way(msgspec.Struct, frozen=True):
    """A hint, perhaps stale: anchors and folds that lead to recent versions, so that a joiner need not list the run."""

    run: str
    links: tuple[Link, ...]
    format: int = FORMAT


Record = TypeVar("Record", Run, Commit, Derived, Head, Way)
Signable = TypeVar("Signable", Run, Commit, Derived)


def in_its_format(run: Run, codecs: tuple[str, ...] = ()) -> Run:
    """The record of a run that begins and lists these codecs, in the oldest format that says all of it."""
    return msgspec.structs.replace(run, codecs=codecs or msgspec.UNSET, format=_format(run.table, codecs))


def _format(table: Iterable[TensorEntry], codecs: object) -> int:
    return LISTED_CODECS if codecs else ALIASES if aliases_of(table) else FORMAT


def hash_of(data: bytes) -> str:
    """What a child's `parent_hash` says of a record: the BLAKE3 of its bytes, 64 hex digits."""
    return blake3(data).hexdigest()


def signed(record: Signable, key: SigningKey | None) -> Signable:
    """The record with its signature; as it is without a key."""
    if key is None:
        return record
    blank = msgspec.structs.replace(record, signer=key.public, signature=UNSIGNED)
    return msgspec.structs.replace(blank, signature=key.sign(write(blank)))


def write(record: Run | Commit | Derived | Head | Way) -> bytes:
    """A record as JSON; equal records give equal bytes. Raises FormatError for one that no reader would accept."""
    _check(record, f"this {type(record).__name__.lower()} record")
    return msgspec.json.encode(record, order="sorted")


def formats_of(kind: type[msgspec.Struct]) -> tuple[int, ...]:
    """The formats in which a kind of record is written and read."""
    return (FORMAT, ALIASES, LISTED_CODECS) if kind is Run else (FORMAT,)


def read(kind: type[Record], data: bytes, *, where: str) -> Record:
    """A record from JSON, checked. `where` names the object in errors. Raises FormatError, UnknownVersion."""
    try:
        version = msgspec.json.decode(data, type=_AnyFormat).format
        if version not in formats_of(kind):
            known = " or ".join(map(str, formats_of(kind)))
            raise UnknownVersion(f"{where}: format {version}; this deltawire reads format {known}, upgrade it")
        record = msgspec.json.decode(data, type=kind)
        if isinstance(record, Run) and (new := [codec for codec in record.may_use if codec not in CODECS]):
            raise UnknownVersion(f"{where}: codecs {some(new)}; this deltawire reads {some(CODECS)}, upgrade it")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not a {kind.__name__.lower()} record: {error}") from None
    _check(record, where)
    return record


class _AnyFormat(msgspec.Struct):
    format: int


def _check(record: Run | Commit | Derived | Head | Way, where: str) -> None:
    _require(_RUN_ID.fullmatch(record.run), where, f"run {record.run!r} is not 16 hex digits")
    if not isinstance(record, Head | Way):
        signer, signature = record.signer, record.signature
        _require((signer is None) == (signature is None), where, "a signer without a signature, or the reverse")
        _require(signer is None or is_public_key(signer), where, "the signer is not a key of 64 hex digits")
        _require(signature is None or _HEX128.fullmatch(signature), where, "the signature is not 128 hex digits")
    if isinstance(record, Way):
        for link in record.links:
            bounded = 0 <= (link.start or 0) <= link.end < _MAX_VERSION and 0 <= link.size < _MAX_VERSION
            _require(bounded and is_key(link.record), where, f"link {link}")
    elif isinstance(record, Run):
        _check_run(record, where)
    else:
        _require(0 <= record.version < _MAX_VERSION, where, f"version {record.version}")
    if isinstance(record, Commit | Derived):
        _check_covering(record, where)


def _check_run(run: Run, where: str) -> None:
    _require(all(map(is_public_key, run.compactors)), where, "a compactor is not a key of 64 hex digits")
    _require(run.table, where, "the tensor table is empty")
    names = [name for entry in run.table for name in (entry.name, *entry.aliases)]
    _require(len({*names}) == len(names), where, "a name stands twice in the tensor table")
    _require(not any("\0" in name for name in names), where, "a name in the tensor table has a NUL")
    _require(
        run.format == _format(run.table, run.codecs), where, f"format {run.format} is not that of its table and codecs"
    )
    _require(run.codecs != (), where, "its list of codecs is empty")
    _require(len({*run.may_use}) == len(run.may_use), where, "a codec stands twice among its codecs")
    _require(run.may_use[0] not in NEED_WEIGHTS, where, "the first of its codecs needs weights, and folds are of it")
    for entry in run.table:
        facts = f"{entry.name}: impossible dtype {entry.dtype!r} or shape {list(entry.shape)}"
        _require(_is_possible(entry), where, facts)


def _check_covering(record: Commit | Derived, where: str) -> None:
    if isinstance(record, Derived):
        _require(_HEX64.fullmatch(record.commit_hash), where, "the commit's hash is not 64 hex digits")
    after = record.parent_hash is None or _HEX64.fullmatch(record.parent_hash)
    _require(after, where, "parent hash is not 64 hex digits")
    _require(record.parent is None or 0 <= record.parent < record.version, where, f"parent {record.parent}")
    _require(_HEX64.fullmatch(record.root), where, "root is not 64 hex digits")
    digests = all(_HEX16.fullmatch(value) for value in record.digests.values())
    _require(digests, where, "a digest is not 16 hex digits")
    for payload in record.payloads:
        safe = is_key(payload.key) and payload.size >= 0 and _HEX64.fullmatch(payload.blake3)
        _require(safe, where, f"payload {payload.key!r}: unsafe key, negative size or malformed hash")
    files = {payload.key.rpartition("/")[2] for payload in record.payloads}
    _require(len(files) == len(record.payloads), where, "two payloads have the same file name")


def _require(sound: object, where: str, what: str) -> None:
    if not sound:
        raise FormatError(f"{where}: {what}")


def _is_possible(entry: TensorEntry) -> bool:
    sizes = entry.shape
    bounded = len(sizes) <= MAX_RANK and all(0 <= size < 1 << 48 for size in sizes) and count(sizes) < 1 << 48
    return entry.dtype in WIDTHS and bounded
