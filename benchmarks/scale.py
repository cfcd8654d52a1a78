"""What a parameter, a version and a tensor cost as there are more of them, and how much memory that takes.

    python benchmarks/scale.py parameters [--sizes 10e6 100e6 1e9 4e9] [--folder DISK]
    python benchmarks/scale.py versions [--most 10000]
    python benchmarks/scale.py tensors [--most 20000]

`parameters` publishes a synthetic model in safetensors shards (bf16, 1 % of it changed a version, baseline="file") to a
folder and applies each version to a mirror. Four billion parameters take 33 GB of disk: base, model, baseline and
mirror. Memory is that above the page cache (RssAnon): what maps a file can be dropped at any time.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from anonymous import Memory

import deltawire as dw
from deltawire.buckets import Bucket
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.local_copy import LocalCopy
from deltawire.read.subscriber import Subscriber
from deltawire.weights.bits import Bits
from deltawire.weights.table import TensorEntry

COLUMNS = 4096
LARGEST = 1 << 26
"""elements of the largest tensor"""
SHARE = 0.01
WINDOW = 10
"""versions around each milestone whose median counts"""


class Synthetic(Mapping[str, Bits]):
    """Weights made when they are asked for: normal bf16 values, the same for the same name."""

    def __init__(self, parameters: int) -> None:
        sizes, left = [], parameters // COLUMNS
        while left:
            sizes.append(min(left, LARGEST // COLUMNS))
            left -= sizes[-1]
        self._rows = {f"layers.{number}.weight": rows for number, rows in enumerate(sizes)}
        tile = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
        self._tile = (tile.view(np.uint32) >> 16).astype(np.uint16)

    def __getitem__(self, name: str) -> Bits:
        shape = (self._rows[name], COLUMNS)
        return Bits("BF16", shape, np.resize(self._tile, shape[0] * shape[1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def table(self) -> list[TensorEntry]:
        return [TensorEntry(name, "BF16", (rows, COLUMNS)) for name, rows in self._rows.items()]


def step(model: Mapping[str, Bits], seed: int) -> None:
    """Move about one element in a hundred up by one step of its bits."""
    rng = np.random.default_rng(seed)
    for name in model:
        data = model[name].data
        data[rng.integers(0, data.size, int(SHARE * data.size))] += np.uint16(1)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_parameters(size: int, folder: Path, versions: int = 3) -> tuple[float, float]:
    """Print what one size takes; seconds of a publish and of an update of the mirror per parameter."""
    weights = Synthetic(size)
    for name in ("base", "model"):
        (folder / name).mkdir()
        checkpoint.write(folder / name, weights.table, weights)
    model = Checkpoint(folder / "model", writable=True)
    bucket = dw.open_bucket((folder / "bucket").as_uri(), create=True)
    copy, published, applied = LocalCopy(folder / "mirror"), [], []
    total = sum(bits.data.size for bits in weights.values())
    with Memory() as trainer, dw.Publisher(bucket, base=folder / "base", baseline="file") as publisher:
        for seed in range(versions):
            step(model, seed)
            report = publisher.publish(model)
            publisher.flush()
            published.append(report.seconds)
    with Memory() as reader, Subscriber(bucket, base=folder / "base") as subscriber:
        copy.at(subscriber, 0)
        for version in range(1, versions + 1):
            applied.append(timed(lambda version=version: copy.at(subscriber, version)))
        mirror, _ = copy.at(subscriber, versions)
        assert all(mirror.weights[name] == model[name] for name in model), "the mirror is not the model"
    copy.close()
    publish, apply = statistics.median(published) / total, statistics.median(applied) / total
    print(
        f"{total:>13,} parameters: publish {1e9 * publish:.2f} ns and update of a mirror {1e9 * apply:.2f} ns a "
        f"parameter; memory above the page cache {trainer.most / 2**30:.2f} and {reader.most / 2**30:.2f} GiB; "
        f"{report.wire_bytes / report.changed:.2f} bytes a change",
        flush=True,
    )
    return publish, apply


def parameters(sizes: list[float], place: str | None) -> None:
    """Models of more and more parameters."""
    costs = []
    for size in sizes:
        with scratch(place) as folder:
            costs.append(measure_parameters(int(size), folder))
    say_growth("parameter", ("publish", "update of a mirror"), costs)


def versions(most: int) -> None:
    """A model of a million parameters over many versions: what one more costs its trainer, and a reader that starts."""
    weights = {name: bits.copy() for name, bits in Synthetic(1 << 20).items()}
    milestones = [10**power for power in range(1, 8) if 10**power <= most]
    published: list[float] = []
    costs: list[tuple[float, float]] = []
    with scratch(None) as folder:
        bucket = dw.open_bucket((folder / "bucket").as_uri(), create=True)
        with dw.Publisher(bucket) as publisher:
            for version in range(max(milestones) + 1):
                step(weights, version)
                published.append(timed(lambda: (publisher.publish(weights), publisher.flush())))
                if version in milestones:
                    read = [timed(lambda last=last: read_one(bucket, last)) for last in range(version, version - 9, -1)]
                    costs.append((statistics.median(published[-WINDOW:]), statistics.median(read)))
                    print(
                        f"version {version:>6,}: publish and flush {1e3 * costs[-1][0]:.1f} ms, "
                        f"read by a reader that starts {1e3 * costs[-1][1]:.1f} ms",
                        flush=True,
                    )
    say_growth("version", ("publish and flush", "read"), costs)


def read_one(bucket: Bucket, version: int) -> None:
    """Read one version as a process does that starts and holds the one before."""
    with Subscriber(bucket) as subscriber:
        subscriber.change(subscriber.position_at(version - 1), version)


def measure_tensors(count: int) -> tuple[float, float]:
    """Print what a model of so many tensors takes; seconds of a publish and of a reader's start, a tensor."""
    flat = np.resize(Synthetic(LARGEST)["layers.0.weight"].data, count * COLUMNS)
    rows = flat.reshape(count, COLUMNS)
    weights = {f"layers.{number}.weight": Bits("BF16", (64, 64), rows[number]) for number in range(count)}
    published, read = [], []
    with scratch(None) as folder:
        bucket = dw.open_bucket((folder / "bucket").as_uri(), create=True)
        with dw.Publisher(bucket) as publisher:
            publisher.publish(weights)
            for version in range(1, 6):
                flat[np.random.default_rng(version).integers(0, flat.size, flat.size // 100)] += np.uint16(1)
                published.append(timed(lambda: (publisher.publish(weights), publisher.flush())))
                read.append(timed(lambda version=version: read_one(bucket, version)))
    publish, reading = statistics.median(published) / count, statistics.median(read) / count
    print(
        f"{count:>7,} tensors: publish and flush {1e6 * publish:.1f} us, read {1e6 * reading:.1f} us each", flush=True
    )
    return publish, reading


def tensors(most: int) -> None:
    """Models of more and more tensors of 4,096 elements: what one of them costs a trainer, and a reader that starts."""
    costs = [measure_tensors(count) for count in (200, 2_000, 20_000, 200_000) if count <= most]
    say_growth("tensor", ("publish and flush", "read"), costs)


def say_growth(unit: str, what: tuple[str, ...], costs: list[tuple[float, ...]]) -> None:
    """Say how many times the first's cost the last of a row of measurements has."""
    for name, column in zip(what, zip(*costs, strict=True), strict=True):
        print(f"{name}: the last costs {column[-1] / column[0]:.2f} times the first, a {unit}")


@contextmanager
def scratch(place: str | None) -> Iterator[Path]:
    """A folder for a measurement, which is removed after it."""
    folder = Path(tempfile.mkdtemp(prefix="deltawire-scale-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    by_size = what.add_parser("parameters")
    by_size.add_argument("--sizes", type=float, nargs="+", default=[10e6, 100e6, 1e9, 4e9])
    by_size.add_argument("--folder", help="where there is room (default: the folder of temporary files)")
    what.add_parser("versions").add_argument("--most", type=int, default=10_000)
    what.add_parser("tensors").add_argument("--most", type=int, default=20_000)
    options = parser.parse_args()
    if options.what == "parameters":
        parameters(options.sizes, options.folder)
    elif options.what == "versions":
        versions(options.most)
    else:
        tensors(options.most)


if __name__ == "__main__":
    main()
