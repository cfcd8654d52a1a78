"""A run whose deltas are of codec `class`, and a check of each against its parent's bits by the independent reader."""

import json

import reference
from runs import PATIENCE, edit, fresh, model, publishing, served

from deltawire.buckets.base import Bucket
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat


def deltas(bucket: Bucket) -> dict[int, bytes]:
    """The delta file of each version that has one."""
    keys = [stat.key for stat in bucket.list("runs/") if "/deltas/" in stat.key]
    found = {}
    for key in keys:
        data = bucket.get(key, limit=1 << 20)
        _, _, version = json.loads(about(data)["range"])
        assert version not in found
        found[version] = data
        assert (about(data)["codec"] == "class") == key.endswith(".class.safetensors")
    return found


def about(data: bytes) -> dict:
    return reference.container(data)[0]["__metadata__"]


def codecs(bucket: Bucket) -> dict[int, str]:
    """The codec of each version's delta file."""
    return {version: about(data)["codec"] for version, data in sorted(deltas(bucket).items())}


def require_exact(bucket: Bucket, versions: dict) -> None:
    """Every delta, read by the independent reader against its parent's bits, leads to its version's."""
    for data in deltas(bucket).values():
        _, parent, version = json.loads(about(data)["range"])
        base = {name: bits.data.tolist() for name, bits in versions[parent].items()}
        changed = reference.delta(data, base)
        for name, bits in versions[version].items():
            _, _, steps = changed.get(name, (None, None, {}))
            after = [(value + steps.get(at, 0)) % (1 << 16) for at, value in enumerate(base[name])]
            assert after == bits.data.tolist(), f"version {version}: {name}"


def class_run(count: int) -> tuple[Bucket, dict]:
    """A bucket with versions 0 to `count` - 1, and the bits of each."""
    bucket, weights, versions = fresh(), model(), {}
    with publishing(bucket, codec="class") as publisher:
        for version in range(count):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            versions[version] = served(weights)
            edit(weights, version, share=0.05)
    return bucket, versions


def say(bucket: Bucket, replica: str, *codecs: str, at: float, every: float = 30.0) -> None:
    """A replica's heartbeat."""
    heartbeats.beat(bucket, Heartbeat(replica, at=at, every=every, codecs=codecs))
