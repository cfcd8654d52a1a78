"""What readers of one host save that share its cache, and whether sharing what they decode would save more.

    python benchmarks/host_cache.py [--readers 8] [--millions 100] [--changed 0.01]

First that many processes read the same delta from a local HTTP store (S3 API), each for itself and then by the cache.
It counts the bytes that the store sent. Then one process takes the parts of reading apart, medians of five: hashing the
file, decoding it, and what a reader would do instead with positions and increments that another had decoded: map the
file, and check that no position is outside of its tensor. Weights are random; a change is one step of bf16.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from small_s3 import SmallS3, small_s3

import deltawire as dw
from deltawire.format import delta_file
from deltawire.read.host_cache import host_cache
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, TensorDelta


def publish(millions: int, changed: float) -> None:
    """Two versions of random weights in `s3://weights/run`."""
    rng = np.random.default_rng(0)
    weights = {f"layer.{n}": rng.integers(0, 1 << 16, 1_000_000, np.uint16) for n in range(millions)}
    with dw.Publisher(dw.open_bucket("s3://weights/run")) as publisher:
        for _ in range(2):
            publisher.publish({name: Bits("BF16", value.shape, value.copy()) for name, value in weights.items()})
            publisher.flush(600)
            for value in weights.values():
                value[rng.random(value.size) < changed] += 1


def read() -> float:
    """Seconds of one reader for the delta of version 1."""
    with dw.Subscriber(dw.open_bucket("s3://weights/run"), cache=host_cache()) as subscriber:
        commit = subscriber.commits()[1]
        started = time.perf_counter()
        subscriber.fetch_delta(commit)
        return time.perf_counter() - started


def readers(number: int, cache: str, store: SmallS3) -> tuple[int, float]:
    """Bytes of deltas that the store sent to so many processes, and seconds until the last was done."""
    os.environ["DELTAWIRE_CACHE"] = cache
    asked, started, children = len(store.asked), time.perf_counter(), []
    for _ in range(number):
        if (child := os.fork()) == 0:
            read()
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    seconds = time.perf_counter() - started
    gets = [one.key for one in store.asked[asked:] if one.method == "GET" and "/deltas/" in one.key]
    return sum(len(store.objects[key]) for key in gets), seconds


def median(work: Callable[[], object]) -> float:
    """Milliseconds of a call, the median of five."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def save(delta: Delta, folder: Path) -> None:
    """The decoded form: positions and increments end to end."""
    np.save(folder / "positions.npy", np.concatenate([one.positions for one in delta.values()]))
    np.save(folder / "increments.npy", np.concatenate([one.increments for one in delta.values()]))


def load(folder: Path, like: Delta) -> Delta:
    """The decoded form, mapped and checked: ascending positions, none outside of its tensor."""
    positions, increments = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("positions", "increments"))
    delta, at = {}, 0
    for name, one in like.items():
        here = positions[at : at + one.changed]
        assert here[-1] < 1_000_000 and bool((here[1:] > here[:-1]).all())
        delta[name] = TensorDelta(one.dtype, one.shape, here, increments[at : at + one.changed])
        at += one.changed
    return Delta(delta)
