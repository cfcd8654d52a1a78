"""What readers of one host save that share its cache, and whether sharing what they decode would save more.

    python benchmarks/host_cache.py [--readers 8] [--millions 50] [--changed 0.01] [--tensors 48]

First that many processes read the same delta from a local HTTP store (S3 API), each for itself and then by the cache.
It counts the bytes that the store sent. Then one process takes the parts of reading apart, medians of five: hashing the
file, decoding it, and what a reader would do instead with positions and increments that another had decoded: map the
file, and check that no position is outside of its tensor. Weights are random; a change is one step of bf16.

Last that many tensor-parallel workers, each of which holds its share of rows or columns of each tensor (4.2 million
weights), join and follow. What each takes is anonymous memory beside its weights, sampled every millisecond.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from blake3 import blake3

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from host_workers import SHAPE, VERSIONS, measure
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


def read() -> Delta:
    """The delta of version 1, as a reader of the host gets it."""
    with dw.Subscriber(dw.open_bucket("s3://weights/run"), cache=host_cache()) as subscriber:
        return subscriber.fetch_delta(subscriber.commits()[1])


def readers(number: int, cache: str, store: SmallS3) -> int:
    """Bytes of deltas that the store sent to so many processes at once."""
    asked, command = len(store.asked), [sys.executable, __file__, "--read"]
    environ = {**os.environ, "DELTAWIRE_CACHE": cache}
    started = [subprocess.Popen(command, env=environ) for _ in range(number)]
    assert [process.wait(600) for process in started] == [0] * number
    gets = [one.key for one in store.asked[asked:] if one.method == "GET" and "/deltas/" in one.key]
    return sum(len(store.objects[key]) for key in gets)


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


def shares(number: int, store: SmallS3, folder: Path) -> None:
    """Print what so many readers take of the store, with and without a cache."""
    (size,) = [len(data) for key, data in store.objects.items() if "/deltas/" in key]
    print(f"one delta: {size / 1e6:.2f} MB")
    for name, cache in (("each for itself", "off"), ("by the cache", str(folder / "cache"))):
        print(f"{number} readers, {name}: {readers(number, cache, store) / size:.2f} times its bytes")


def parts(store: SmallS3, folder: Path) -> None:
    """Print how long each part of reading takes."""
    (data,) = [data for key, data in store.objects.items() if "/deltas/" in key]
    delta = read()
    save(delta, folder)
    held = sum(path.stat().st_size for path in folder.glob("*.npy"))
    print(f"fetching it at 1 Gbit/s: {8 * len(data) / 1e6:.0f} ms, at 10 Gbit/s {8 * len(data) / 1e7:.0f} ms")
    print(f"hashing it: {median(lambda: blake3(data).digest()):.1f} ms")
    print(f"decoding it, {len(os.sched_getaffinity(0))} cores: {median(lambda: delta_file.decode(data)):.1f} ms")
    print(f"what it decodes to: {held / len(data):.1f} times its bytes")
    print(f"writing that: {median(lambda: save(delta, folder)):.1f} ms")
    print(f"mapping and checking that instead of decoding: {median(lambda: load(folder, delta)):.1f} ms")


def slices(workers: int, tensors: int, cache: Path) -> None:
    """Print what each of so many workers takes for its part of a model of so many tensors."""
    sent, said, _ = measure(tensors, range(workers), workers, cache)
    held, size = max(worker[0]["held"] for worker in said), 2 * tensors * SHAPE[0] * SHAPE[1]
    print(f"{workers} workers of a model of {size / 1e6:.0f} MB: {sent:.2f} times its payloads are fetched")
    print(
        f"a worker holds {held / 1e6:.1f} MB of it, and the largest tensor has {2 * SHAPE[0] * SHAPE[1] / 1e6:.1f} MB"
    )
    for version, what in enumerate(VERSIONS):
        taken = [worker[version]["taken"] / 1e6 for worker in said]
        print(f"staging, {what}: {min(taken):.1f} to {max(taken):.1f} MB a worker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--changed", type=float, default=0.01)
    parser.add_argument("--tensors", type=int, default=48)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read()
        return
    with small_s3() as store, tempfile.TemporaryDirectory() as work:
        publish(options.millions, options.changed)
        shares(options.readers, store, Path(work))
        os.environ["DELTAWIRE_CACHE"] = "off"
        parts(store, Path(work))
    with tempfile.TemporaryDirectory() as work:
        slices(options.readers, options.tensors, Path(work))


if __name__ == "__main__":
    main()
