"""What a version costs where weights are on a GPU: each row beside its bound, and beside the host path of the same run.

    python benchmarks/gpu.py [--quick] [--seconds 1200] [--folder /dev/shm]
    python benchmarks/gpu.py --device cpu --elements 1e5     # the same program without a GPU: no figures of any GPU

Random weights in the shapes of Qwen3-0.6B and Qwen3-8B; 0.1, 1 and 3 % of them change a version. Rows, of medians:

`publish`: until the call returned and the trainer's stream is free, with baseline="device" and baseline="host".
`fetch and stage`: fetch from a folder, decode, place, gather, add and digest, by a worker whose model is on the device,
and by one whose model is in host memory. `write`: its pause alone. `attach`: until it knows its version. `digest`: all
weights. `encode` and `decode`: a change to its file's bytes and back, on the host. `rank`: changes of bf16 weights by
class, which a publish of codec `class` adds on the device.

Bounds are the bytes that must move at the speed of a plain copy, measured first. Memory is the device path's, at its
peak above what was there; that of a publish includes its baseline, that of a worker not its model. Rows are printed as
they are measured; after `--seconds` none begins.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import deltawire as dw
from deltawire.format import checkpoint
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from gpu_bounds import Copies, measure_copies, milliseconds, synchronize
from gpu_ranks import measure_ranks
from gpu_table import Memory, OutOfTime, Table
from gpu_weights import Served, Weights

WAYS = ("device", "host")
"""where a publisher's baseline lies, and where a worker's model does"""
SHARES = (0.001, 0.01, 0.03)
ROUNDS = 3
QUICK = 150
"""seconds, so that all is over in three minutes"""
ALL = [("0.6b", torch.float32), ("0.6b", torch.bfloat16), ("8b", torch.float32), ("8b", torch.bfloat16)]
"""what is measured, in this order"""
WAIT = 600


class Trainer:
    """Weights on a device, and a publisher of them with each kind of baseline, on one base."""

    def __init__(self, weights: Weights, base: Path, folder: Path, stack: ExitStack) -> None:
        self.weights, self.urls = weights, {}
        self.publishers: dict[str, dw.Publisher] = {}
        for baseline in WAYS:
            bucket = dw.open_bucket((folder / baseline).as_uri(), create=True)
            publisher = stack.enter_context(dw.Publisher(bucket, base=base, baseline=baseline))
            publisher.publish(weights.tensors)
            publisher.flush(WAIT)
            self.publishers[baseline], self.urls[baseline] = publisher, bucket.url

    def publish(self, baseline: str) -> tuple[float, dw.PublishReport]:
        """Milliseconds until the call is over and the stream is free, and its report."""
        synchronize(self.weights.device)
        started = time.perf_counter()
        report = self.publishers[baseline].publish(self.weights.tensors)
        synchronize(self.weights.device)
        took = 1e3 * (time.perf_counter() - started)
        self.publishers[baseline].flush(WAIT)
        return took, report

    def publish_both(self) -> None:
        """The same change to the buckets of both."""
        for baseline in WAYS:
            self.publish(baseline)


def measure_publish(trainer: Trainer, share: float, copies: Copies, table: Table) -> None:
    """Print how long a trainer waits at one share of changes."""
    table.require_time()
    weights, memory = trainer.weights, Memory(trainer.weights.device)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        weights.edit(share)
        with memory.watching():
            took, report = trainer.publish("device")
        times["device"].append(took)
        times["host"].append(trainer.publish("host")[0])
    memory.device += report.baseline_device_bytes
    memory.host += report.baseline_bytes - report.baseline_device_bytes
    device, host = (statistics.median(times[way]) for way in WAYS)
    what = f"publish, {weights.name}, {report.density:.1%}"
    table.row(what, device, copies.publish(report.total, weights.width), host, memory)


def measure_update(
    trainer: Trainer, workers: dict[str, LiveWorker], share: float, copies: Copies, table: Table
) -> None:
    """Print how long workers take to stage and to write a version, and its file's bytes to be made and read."""
    table.require_time()
    memory = Memory(trainer.weights.device)
    stage, write = ({way: list[float]() for way in WAYS} for _ in range(2))
    for _ in range(ROUNDS):
        trainer.weights.edit(share)
        trainer.publish_both()
        with memory.watching():
            commit(workers["device"], trainer.urls["device"])
        commit(workers["host"], trainer.urls["host"])
        for way, worker in workers.items():
            applied = done(worker).applied
            stage[way].append(1e3 * (applied.fetch_s + applied.stage_s))
            write[way].append(applied.write_ms)
    (staged, staged_host), (written, written_host) = (
        [statistics.median(times[way]) for way in WAYS] for times in (stage, write)
    )
    what = f"{trainer.weights.size}, {applied.changed / trainer.weights.count:.1%}"
    table.row(f"fetch and stage, {what}", staged, copies.stage(applied.changed), staged_host, memory)
    table.row(f"write, {what}", written, copies.write(applied.changed), written_host)
    measure_coding(trainer.publishers["device"].bucket, what, copies, table)


def commit(worker: LiveWorker, url: str) -> None:
    """Bring a worker to the newest version of a bucket."""
    with dw.Subscriber(dw.open_bucket(url)) as subscriber:
        version = subscriber.latest().version
    worker.commit({"bucket": url, "version": version})
    done(worker)
    worker.confirm()


def measure_coding(bucket: Any, what: str, copies: Copies, table: Table) -> None:
    """Print what the newest delta's bytes cost, which the host makes and reads."""
    newest = max(stat.key for stat in bucket.list("runs/") if "/deltas/" in stat.key)
    data = bucket.get(newest, limit=1 << 34)
    delta = dw.decode(data)
    bound = copies.code(len(delta), len(data))
    table.row(f"encode, {what}", None, bound, milliseconds(lambda: dw.encode(delta), "cpu", ROUNDS))
    table.row(f"decode, {what}", None, bound, milliseconds(lambda: dw.decode(data), "cpu", ROUNDS))


def done(worker: LiveWorker) -> Any:
    """The worker's status. Raises RuntimeError for what it could not do."""
    status = worker.status()
    if status.error is not None:
        raise RuntimeError(f"{status.error.kind}: {status.error.message}")
    return status


def attach(trainer: Trainer, base: Path, copies: Copies, table: Table) -> dict[str, LiveWorker]:
    """A worker with its model on the device, and one with it in host memory, both at the base; their rows."""
    workers, attached, swept = {}, [], []
    memory = Memory(trainer.weights.device)
    for way, device in (("device", trainer.weights.device), ("host", "cpu")):
        served = Served(trainer.weights, device)
        workers[way] = worker = LiveWorker(served, loading=AfterLoading())
        started = time.perf_counter()
        with memory.watching() if way == "device" else nullcontext():
            worker.attach(trainer.urls[way], base=str(base))
            done(worker)
            synchronize(device)
        attached.append(1e3 * (time.perf_counter() - started))
        swept.append(milliseconds(worker.live.attached.live.digests, device, ROUNDS))
    bound = copies.digest(trainer.weights.count)
    table.row(f"attach, {trainer.weights.size}", attached[0], bound, attached[1], memory)
    table.row(f"digest, {trainer.weights.size}", swept[0], bound, swept[1])
    return workers


@contextmanager
def run_of(size: str, dtype: torch.dtype, device: str, folder: Path) -> Iterator[tuple[Trainer, Path]]:
    """A trainer of a model's shape, and the base that its run starts from."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary, ExitStack() as stack:
        weights, base = Weights(size, dtype, device), Path(temporary) / "base"
        base.mkdir()
        os.environ["DELTAWIRE_CACHE"] = f"{temporary}/cache"
        checkpoint.write(base, weights.entries, weights)
        yield Trainer(weights, base, Path(temporary), stack), base


def measure(
    size: str, dtype: torch.dtype, options: argparse.Namespace, copies: Copies, table: Table, *, serves: bool
) -> None:
    """Print the rows of one shape and dtype, and with `serves` those of a server, which no trainer's dtype changes."""
    table.require_time()
    with run_of(size, dtype, options.device, options.folder) as (trainer, base):
        for share in options.shares:
            measure_publish(trainer, share, copies, table)
            if dtype == torch.bfloat16:
                measure_ranks(trainer.weights, share, copies, table)
        if not serves:
            return
        workers = attach(trainer, base, copies, table)
        for share in options.shares:
            measure_update(trainer, workers, share, copies, table)
        for worker in workers.values():
            worker.close()


def warm_up(options: argparse.Namespace, copies: Copies) -> None:
    """Have everything compiled and loaded: the same with few weights, of which nothing is printed."""
    few = argparse.Namespace(**{**vars(options), "shares": [0.01]})
    for dtype in (torch.float32, torch.bfloat16):
        measure("20000", dtype, few, copies, Table(WAIT, silent=True), serves=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--elements", type=float, help="a made-up shape of so many weights, in place of the models'")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seconds", type=float, default=1200, help="from the start, after which no row begins")
    parser.add_argument("--quick", action="store_true", help="over in three minutes: without the masters of 8B")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for bases and buckets")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.py needs a CUDA device, and this host has none: --device cpu tries the program")
    over = time.monotonic() + (min(options.seconds, QUICK) if options.quick else options.seconds)
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu, which says nothing of a GPU"
    print(f"{where}; torch {torch.__version__}, deltawire {dw.__version__}")
    if options.elements:
        runs = [(f"{options.elements:.0f}", dtype) for dtype in (torch.float32, torch.bfloat16)]
    else:
        runs = [run for run in ALL if not options.quick or run != ("8b", torch.float32)]
    copies = measure_copies(device, 1 << 29 if device == "cuda" else 1 << 24)
    print(f"copies: device {copies.device / 1e6:,.0f} GB/s and host {copies.host / 1e6:,.1f} GB/s read and written, "
          f"bus {copies.bus / 1e6:,.1f} GB/s\n")  # fmt: skip
    if device == "cuda":
        warm_up(options, copies)
    if not measure_all(runs, options, copies, Table(over - time.monotonic())):
        raise SystemExit(1)


def measure_all(runs: list[tuple[str, torch.dtype]], options: argparse.Namespace, copies: Copies, table: Table) -> bool:
    """Print what can be measured in the time there is; whether nothing failed. One that fails keeps no other back."""
    served: set[str] = set()
    failed = False
    for size, dtype in runs:
        try:
            measure(size, dtype, options, copies, table, serves=size not in served)
        except OutOfTime:
            print(f"\nNot measured, for its time was over: {size} in {dtype}, and what comes after it.", flush=True)
            break
        except Exception as error:
            print(f"\nFailed: {size} in {dtype}: {error!r}", flush=True)
            failed = True
        served.add(size)
    return not failed


if __name__ == "__main__":
    main()
