"""A small model, its edits, and a plain reader: what the tests of a run share."""

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from waiting import PATIENCE

from deltawire import Publisher, Subscriber, Update, digest, open_bucket
from deltawire.buckets import Bucket
from deltawire.errors import DeltaWireError
from deltawire.read.host_cache import HostCache
from deltawire.runlog.keys import commit_key
from deltawire.runlog.log import list_versions, load_commit
from deltawire.runlog.records import Commit, Position, hash_of, read, write
from deltawire.weights.bits import Bits
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import cast

SHAPES = {"embed.weight": (60, 8), "layer.0.weight": (16, 8), "layer.0.bias": (16,), "norm": (8,), "scale": ()}
Weights = dict[str, np.ndarray]


def fresh() -> Bucket:
    """An empty bucket of its own."""
    return open_bucket(f"memory://{uuid.uuid4()}")


def model(seed: int = 0) -> Weights:
    """fp32 weights as a trainer holds them."""
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(0, 0.02, shape), np.float32) for name, shape in SHAPES.items()}


def edit(weights: Weights, seed: int, *names: str, share: float = 0.1) -> None:
    """An optimizer step, in place, that moves about `share` of the elements (of the named tensors, or of all)."""
    rng = np.random.default_rng(seed)
    for name in names or weights:
        moves = (rng.random(weights[name].shape) < share) * rng.normal(0, 0.02, weights[name].shape)
        weights[name] += moves.astype(np.float32)


def served(weights: Mapping[str, Any]) -> dict[str, Bits]:
    """The bits a server must end up with, in memory of their own."""
    return {name: cast(tensor, "BF16").copy() for name, tensor in weights.items()}


def table(weights: Mapping[str, Bits]) -> tuple[TensorEntry, ...]:
    """The tensor table of these weights, all of them trainable."""
    return tuple(TensorEntry(name, bits.dtype, bits.shape) for name, bits in weights.items())


@contextmanager
def publishing(bucket: Any, *, cls: type[Publisher] = Publisher, **options: Any) -> Iterator[Publisher]:
    """A publisher that cannot outlive its test, whatever the bucket does."""
    publisher = cls(bucket, **options)
    try:
        yield publisher
    except BaseException:
        with suppress(DeltaWireError):
            publisher.close(timeout=0)  # the test is lost: do not wait for an upload that may never succeed
        raise
    finally:
        publisher.close(timeout=PATIENCE)


def publish_all(bucket: Any, *versions: Mapping[str, Any], **options: Any) -> None:
    """Each of these weights as a commit of its own."""
    with publishing(bucket, **options) as publisher:
        for weights in versions:
            publisher.publish(weights)
            publisher.flush(timeout=PATIENCE)


def read_weights(
    bucket: Bucket, version: int | None = None, *, base: Path | None = None, cache: HostCache | None = None
) -> dict[str, Bits]:
    """What a reader holds at a version, every digest on the way checked."""
    held: dict[str, Bits] = {}
    with Subscriber(bucket, base=base, cache=cache) as subscriber:
        for update in subscriber.updates(until=version):
            if update.anchor is not None:
                held = {entry.name: update.anchor[entry.name].copy() for entry in subscriber.run.table}
            else:
                update.delta.apply_(held)
            assert digest(held) == update.digests
    return held


def commits(bucket: Bucket) -> list[Commit]:
    """The chain as a reader sees it."""
    with Subscriber(bucket) as subscriber:
        return subscriber.commits()


def replace_commit(bucket: Bucket, version: int, change: Callable[[Commit], Commit]) -> Commit:
    """Overwrite a commit as only an intruder would, and link its children to it anew; the forgery."""
    (run,) = {found[1] for stat in bucket.list("runs/") if (found := re.match("runs/([0-9a-f]{16})/", stat.key))}
    key = commit_key(run, version)
    forged = change(read(Commit, bucket.get(key, limit=1 << 20), where=key))
    bucket.put(key, write(forged))
    last = forged
    for number in (number for number in list_versions(bucket, run) if number > version):
        child = load_commit(bucket, run, number).record
        last = msgspec.structs.replace(child, parent_hash=hash_of(write(last)))
        bucket.put(commit_key(run, number), write(last))
    return forged


def chain_of_four() -> tuple[Bucket, list[dict[str, Bits]]]:
    """A bucket with versions 0 to 3, and the trainer's bits at each."""
    bucket, weights = fresh(), model()
    steps = []
    for step in range(4):
        edit(weights, step)
        steps.append({name: tensor.copy() for name, tensor in weights.items()})
    publish_all(bucket, *steps)
    return bucket, [served(step) for step in steps]


def position(bucket: Bucket, version: int) -> Position:
    """Where a copy at a version stands."""
    return commits(bucket)[version].position


def payload_key(bucket: Bucket, version: int) -> str:
    """The key of a version's first payload."""
    commit = commits(bucket)[version]
    return f"runs/{commit.run}/{commit.payloads[0].key}"


def updates(bucket: Bucket, since: Position | None = None, **options: Any) -> list[Update]:
    """What a fresh reader gets."""
    with Subscriber(bucket) as subscriber:
        return list(subscriber.updates(since, **options))
