"""Whether an anchor can be begun at: its record, its signature, every byte of its files. What was read is remembered.

A prune of what lies before an anchor must know. At 70 billion parameters an anchor is 140 GB, so it is read once:
later proofs ask the store for the tags of its files alone.
"""

from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import Bucket, Stat
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.buckets.verified import download_verified
from deltawire.errors import DAMAGE, BadDigest, DeltaWireError, Forked, NotFound
from deltawire.format import checkpoint
from deltawire.read.host_cache import cache_folder
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.bounds import require_anchor
from deltawire.runlog.keys import payload_key
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Commit, Derived, Payload
from deltawire.weights.digest import digest_bits
from deltawire.weights.table import TensorEntry

REMEMBERED = 1000
"""anchors; the oldest are forgotten"""


def default_memory() -> Path | None:
    """Where this user's proofs are remembered; None for a user without a home."""
    try:
        return cache_folder() / "anchors.json"
    except NotFound:
        return None


class Proofs:
    """Proves anchors of one run. `memory` is a file that remembers them across processes; without it nothing is
    remembered. One that cannot be read or written is as none."""

    def __init__(self, subscriber: Subscriber, *, memory: Path | None = None) -> None:
        self._subscriber, self._memory = subscriber, memory
        self._known = _read(memory)

    def problem(self, edge: Edge, *, going: Container[str] = ()) -> DeltaWireError | None:
        """Why a reader could not begin at an anchor once the keys `going` are deleted; None where it can. Raises what
        passes: Unavailable, OutOfSpace, AccessRefused."""
        try:
            self._prove(edge, going)
        except DAMAGE as error:
            return error
        return None

    def _prove(self, edge: Edge, going: Container[str]) -> None:
        chain, bucket = self._subscriber.chain, self._subscriber.bucket
        (hop,) = chain.read([edge])
        filed, record = hop.filed, hop.filed.record
        if isinstance(record, Commit):
            return  # a run's first version: nothing older is there to be deleted
        if record.commit_hash != chain.commit(edge.end).hash:
            raise Forked(f"{bucket.url}/{edge.record} is the anchor of another commit {edge.end}")
        keys = [payload_key(record.run, payload.key) for payload in record.payloads]
        if borrowed := [key for key in keys if key in going]:
            raise NotFound(f"{bucket.url}/{edge.record} leads to {borrowed[0]}, which is of an older version and goes")
        stats = [bucket.stat(key) for key in keys]
        tags = _tags(stats)
        if self._known.get(filed.hash) == tags:
            return
        _read_all(bucket, record, edge, self._subscriber.run.table)
        self._known = {**self._known, filed.hash: tags}
        _write(self._memory, self._known)


def _read_all(bucket: Bucket, record: Derived, edge: Edge, table: Iterable[TensorEntry]) -> None:
    """Read every file of an anchor, one at a time, and digest every tensor."""
    require_anchor(record, table, f"{bucket.url}/{edge.record}")
    missing = {name: int(value, 16) for name, value in record.digests.items()}
    with TemporaryFolder() as folder:
        for payload in record.payloads:
            path = folder / "file"
            key = payload_key(record.run, payload.key)
            download_verified(bucket, key, path, size=payload.size, blake3=payload.blake3)
            if _is_shard(payload):
                for name, bits in checkpoint.shard(path).items():
                    if name in missing and digest_bits(bits.data) == missing[name]:
                        del missing[name]
    if missing:
        named = ", ".join(sorted(missing)[:5])
        raise BadDigest(f"{bucket.url}/{edge.record}: {len(missing)} tensors are wrong or missing: {named}")


def _is_shard(payload: Payload) -> bool:
    return payload.key.endswith(".safetensors")


def _tags(stats: list[Stat]) -> list[str]:
    return [f"{stat.key} {stat.size} {stat.tag}" for stat in stats]


def _read(memory: Path | None) -> Mapping[str, list[str]]:
    if memory is None:
        return {}
    with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(memory.read_bytes(), type=dict[str, list[str]])
    return {}


def _write(memory: Path | None, known: Mapping[str, list[str]]) -> None:
    if memory is None:
        return
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory) as aside:
            aside.write_bytes(msgspec.json.encode(dict([*known.items()][-REMEMBERED:])))
