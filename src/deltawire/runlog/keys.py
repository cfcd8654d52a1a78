"""Every key of a bucket: how each is written, and what a listed one says. docs/FORMAT.md §6 is the text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from blake3 import blake3

from deltawire.errors import FormatError
from deltawire.runlog.records import Payload

HEAD_KEY = "HEAD.json"
RUNS = "runs/"
REPLICAS = "replicas/"
Kind = Literal["commit", "delta", "fold", "anchor", "fold record", "anchor record"]
_VERSION = r"([0-9]{6,16})"
_KINDS: Mapping[Kind, re.Pattern[str]] = {
    "commit": re.compile(rf"commits/{_VERSION}(?:-[0-9a-f]{{12}})?\.json"),
    "delta": re.compile(rf"deltas/step_{_VERSION}[-.][^/]+"),
    "fold": re.compile(rf"folds/step_{_VERSION}-{_VERSION}-[^/]+"),
    "anchor": re.compile(rf"anchors/step_{_VERSION}-[0-9a-f]{{12}}/[^/]+"),
    "fold record": re.compile(rf"derived/fold-{_VERSION}-{_VERSION}-[0-9a-f]{{12}}\.json"),
    "anchor record": re.compile(rf"derived/anchor-{_VERSION}-[0-9a-f]{{12}}\.json"),
}
_NEEDS_WEIGHTS = re.compile(r"deltas/[^/]+\.class\.safetensors")
_REPLICA = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAG = re.compile(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TRL = re.compile(r"(anchors|deltas)/step_([0-9]+)\.safetensors")
TRL_FOLDERS = ("deltas/", "anchors/")
"""where the layout of TRL's post has its files, which lie in no run (docs/FORMAT.md §5.4)"""
NO_TAGS = frozenset({"newest"})
"""words that stand for a version, and so name no tag"""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a key of a run says of its object: its kind, the version it leads to, and the one a fold starts from. A
    delta may need the weights before it to be read."""

    kind: Kind
    end: int
    start: int | None = None
    needs_weights: bool = False


class CommitKey(NamedTuple):
    """Where the commit of a version lies. Two writers, where a store cannot refuse one, leave two of a version."""

    version: int
    key: str


def listed(run: str, key: str) -> Listed | None:
    """What a key below `runs/<run>/` says; None for one that deltawire does not write there."""
    prefix = run_prefix(run)
    if not key.startswith(prefix):
        return None
    for kind, pattern in _KINDS.items():
        if found := pattern.fullmatch(key, len(prefix)):
            if any(number != f"{int(number):06d}" for number in found.groups()):
                return None
            *start, end = map(int, found.groups())
            return Listed(kind, end, start[0] if start else None, needs_weights(key.removeprefix(prefix)))
    return None


def run_prefix(run: str) -> str:
    """What every key of a run starts with."""
    return f"{RUNS}{run}/"


def run_of(key: str) -> str | None:
    """The run whose commits a key lies among; None for any other key."""
    parts = key.split("/")
    return parts[1] if key.startswith(RUNS) and parts[2:3] == ["commits"] else None


def payload_key(run: str, key: str) -> str:
    """Key of a payload, from the key below its run that a record states."""
    return run_prefix(run) + key


def commits_prefix(run: str) -> str:
    """What the key of every commit of a run starts with."""
    return f"{run_prefix(run)}commits/"


def commit_version(run: str, key: str) -> int | None:
    """The version in the key of a commit of this run; None for a key that is none."""
    found = listed(run, key)
    return found.end if found is not None and found.kind == "commit" else None


def run_key(run: str) -> str:
    """Key of a run's record."""
    return f"{run_prefix(run)}run.json"


def commit_key(run: str, version: int, record_hash: str | None = None) -> str:
    """Key of a version's commit: its number alone where the store lets only one writer have it. Where a second writer
    could overwrite the first, the start of the record's hash is in it too."""
    mark = "" if record_hash is None else f"-{record_hash[:12]}"
    return f"{commits_prefix(run)}{version:06d}{mark}.json"


def commit_keys(run: str, version: int, record_hash: str | None) -> tuple[str, ...]:
    """Every key that a version's commit may have, whatever the store can refuse; by its number alone without a hash."""
    plain = commit_key(run, version)
    return (plain,) if record_hash is None else (plain, commit_key(run, version, record_hash))


def way_key(run: str) -> str:
    """Key of the hint at the cheapest way to a recent version, which a compactor keeps."""
    return f"{run_prefix(run)}way.json"


def delta_key(version: int, blake3: str, rank: int | None = None, *, by_class: bool = False) -> str:
    """Key, below the run, of a version's delta file, or of one rank's part of it. The hash in it is why no key ever
    has two contents. That of codec `class` says so: a listing alone tells which deltas cannot be taken back."""
    part, codec = "" if rank is None else f".r{rank:03d}", ".class" if by_class else ""
    return f"deltas/step_{version:06d}{part}-{blake3[:12]}{codec}.safetensors"


def needs_weights(key: str) -> bool:
    """Whether a payload's key, below its run, says that it is read against the weights before it."""
    return _NEEDS_WEIGHTS.fullmatch(key) is not None


def anchor_prefix(version: int, blake3: str) -> str:
    """Prefix, below the run, of a version's anchor files."""
    return f"anchors/step_{version:06d}-{blake3[:12]}"


def anchor_hash(files: Mapping[str, str]) -> str:
    """What an anchor's prefix is named by: the hash of its files' names and BLAKE3s, in the order of the names."""
    return blake3("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def part_key(version: int, blake3: str, rank: int) -> str:
    """Key, below the run, of one rank's part of an anchor: its change from all-zero bits."""
    return f"{anchor_prefix(version, blake3)}/r{rank:03d}.safetensors"


def fold_key(parent: int, version: int, blake3: str) -> str:
    """Key, below the run, of the delta file that leads from `parent` to `version` in one."""
    return f"folds/step_{parent:06d}-{version:06d}-{blake3[:12]}.safetensors"


def derived_key(run: str, parent: int | None, version: int, payloads: tuple[Payload, ...]) -> str:
    """Key of a fold's or (parent None) an anchor's manifest; it names what it lists, so it never has two contents."""
    named = blake3("".join(f"{payload.key} {payload.blake3}\n" for payload in payloads).encode()).hexdigest()[:12]
    span = f"anchor-{version:06d}" if parent is None else f"fold-{parent:06d}-{version:06d}"
    return f"{run_prefix(run)}derived/{span}-{named}.json"


def derived_since(run: str, version: int) -> list[tuple[str, str]]:
    """(prefix, where to begin) of the listings that together show the folds and anchors of a run from a version on."""
    rooms = ("derived/fold-", "derived/anchor-", "folds/step_", "anchors/step_")
    return [(f"{run_prefix(run)}{room}", f"{run_prefix(run)}{room}{version:06d}") for room in rooms]


def trainer_key(run: str) -> str:
    """Key of what a run's trainer says of itself beside its commits."""
    return f"{run_prefix(run)}trainer.json"


def pruning_key(run: str) -> str:
    """Key of what a prune under way lets go."""
    return f"{run_prefix(run)}pruning.json"


def replica_key(replica: str) -> str:
    """Key of a replica's record. Raises FormatError for a name that is no safe part of a key."""
    if not _REPLICA.fullmatch(replica):
        raise FormatError(f"replica name {replica!r}: use at most 100 letters, digits, '.', '_' and '-'")
    return f"{REPLICAS}{replica}.json"


def tags_prefix(run: str) -> str:
    """What the key of every tag of a run starts with."""
    return f"{run_prefix(run)}tags/"


def tag_key(run: str, name: str) -> str:
    """Key of a tag's record. Raises FormatError for a name that no tag may have."""
    if not _TAG.fullmatch(name) or name in NO_TAGS:
        raise FormatError(
            f"tag {name!r}: use at most 100 letters, digits, '.', '_' and '-', not digits alone, and not 'newest'"
        )
    return f"{tags_prefix(run)}{name}.json"


def tag_name(run: str, key: str) -> str:
    """The name in a key that lies among the tags of a run; it may be none."""
    return key.removeprefix(tags_prefix(run)).removesuffix(".json")


def trl_key(step: int, *, anchor: bool) -> str:
    """Key of a file in the layout of TRL's post: a whole checkpoint, or a delta."""
    return f"{TRL_FOLDERS[anchor]}step_{step:06d}.safetensors"


def trl_step(key: str) -> tuple[int, bool] | None:
    """The step in a key of the layout of TRL's post, and whether it is an anchor's; None for any other key."""
    found = _TRL.fullmatch(key)
    return None if found is None else (int(found[2]), found[1] == "anchors")
