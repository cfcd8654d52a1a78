"""The core of the package, end to end, in a folder: publish, follow, verify and materialise a small run.

`python core_paths.py FOLDER [BLOCKED…]` prints one JSON object: the hash of each delta file's streams, whether a copy
that followed is equal, and the last digests. Modules named BLOCKED cannot be imported, as where they are missing.
"""

import hashlib
import json
import sys
from pathlib import Path

for name in sys.argv[2:]:
    sys.modules[name] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402

import deltawire as dw  # noqa: E402

STEPS = 5
SEED = 0


def versions() -> "list[dict[str, np.ndarray]]":
    """The weights after each optimizer step: sparse, far apart, dense, and of every width."""
    random = np.random.default_rng(SEED)
    weights = {
        "sparse": random.integers(0, 65536, 70_000, np.uint16).view(np.float16),
        "far": np.zeros(400_000, np.uint32),
        "dense": np.zeros((30, 30), np.int64),
        "bytes": np.zeros(999, np.uint8),
    }
    history = [{name: value.copy() for name, value in weights.items()}]
    for step in range(1, STEPS):
        flat = weights["sparse"].view(np.uint16)
        flat[random.choice(flat.size, 900, replace=False)] += np.uint16(step)
        weights["far"][[step, 60_000 * step, -step]] += np.uint32(2**31 + 1)
        weights["dense"] += step
        weights["bytes"][::7] -= np.uint8(step)
        history.append({name: value.copy() for name, value in weights.items()})
    return history


def streams(path: Path) -> bytes:
    """A delta file without its header, which names the run."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def run(folder: Path) -> dict[str, object]:
    """Everything, once."""
    history = versions()
    bucket = dw.open_bucket((folder / "bucket").as_uri(), create=True)
    with dw.Publisher(bucket) as publisher:
        for step, weights in enumerate(history):
            publisher.publish(weights, step=step)
            publisher.flush(30)
    with dw.Subscriber(bucket) as subscriber:
        followed = history[0]
        for update in subscriber.updates(since=subscriber.position_at(0)):
            update.delta.apply_(followed)
        digests = subscriber.digests_at(STEPS - 1)
    return {
        "deltas": [hashlib.sha256(streams(path)).hexdigest() for path in sorted(folder.glob("bucket/runs/*/deltas/*"))],
        "followed": dw.equal(followed, history[-1]) and dw.digest(followed) == digests,
        "verified": dw.verify(bucket).position.version,
        "materialized": dw.materialize(bucket, folder / "checkpoint").position.version,
        "digests": digests,
        "loaded": sorted(name for name in ("numba", "cryptography") if sys.modules.get(name)),
    }


sys.stdout.write(json.dumps(run(Path(sys.argv[1]))))
