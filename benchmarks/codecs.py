"""How many bytes a change takes in each codec, and how long it takes, as a share of one pass that only compares.

    python benchmarks/codecs.py [TRACE …] [--rounds 9] [--json FILE] [--ours]
    python benchmarks/codecs.py --threads

A trace is a folder of `base.safetensors` (or a checkpoint's `model.safetensors`) and of delta files, as
`benchmarks/traces.py` makes them; `random` is 100 million random weights that change by 1 %, and so is no trace. Ours
are files with their headers. What the extra `bench` installs is measured beside them, as are six bytes a change
(position and value) and XOR with zstd. A share of 0.30 says: as long as 3.3 compare passes of the same run. `publish`
compares and encodes, from old and new weights to the file. One core; CPU time, medians of all rounds.

`--threads` measures one core against all that this process may use, in turn, by the clock on the wall; it says how
busy the machine was. `benchmarks/codecs_plot.py` draws what `--json` wrote.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compare_pass import count_changed
from deltawire.format import container, delta_file
from deltawire.format.codecs import fused
from deltawire.weights import kernels, threads
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.delta import Delta
from peers import Codec, Step, Weights, layouts, peers

FUSED = ("subset", "class")
RANDOM = Path("random")


def ours(step: Step) -> Iterator[Codec]:
    """Every codec of deltawire."""
    for codec in delta_file.CODECS:
        yield Codec(
            f"deltawire {codec}",
            lambda codec=codec: delta_file.encode(step.delta, codec=codec, base=step.old),
            lambda data: delta_file.decode(data, base=step.old),
            publish=lambda codec=codec: publish(step, codec),
        )


def publish(step: Step, codec: str) -> bytes:
    """The file of a step, from the weights before and after it."""
    if codec not in FUSED:
        return delta_file.encode(Delta.between(step.old, step.new), codec=codec, base=step.old)
    made = {name: fused.compare(old, step.new[name], by_class=codec == "class") for name, old in step.old.items()}
    delta = Delta({name: change for name, (change, _) in made.items()})
    return delta_file.encode(delta, codec=codec, coded={name: coded for name, (_, coded) in made.items()})


def steps_of(trace: Path) -> Iterator[Step]:
    """The steps of a trace, or one of random weights."""
    if trace == RANDOM:
        rng = np.random.default_rng(0)
        old = {"w": Bits("BF16", (100_000, 1000), _random_bf16(rng, 100_000_000))}
        new = {"w": old["w"].copy()}
        exponents = (old["w"].data >> 7 & 255).astype(np.int64)
        chance = np.minimum(2.0 ** (111.75 - exponents), 1)  # a change of one size crosses small weights' cells oftener
        where = np.flatnonzero(rng.random(exponents.size) < chance)
        new["w"].data[where] += rng.choice(
            np.array([1, 65535, 2, 65534], np.uint16), where.size, p=[0.45, 0.45, 0.05, 0.05]
        )
        yield _step(old, Delta.between(old, new))
        return
    base = next(path for name in ("base.safetensors", "model.safetensors") if (path := trace / name).exists())
    weights = _read(base)
    for path in sorted([*trace.glob("step_*.safetensors"), *trace.glob("delta_*.safetensors")]):
        data = path.read_bytes()
        header, step = delta_file.read_header(data), _step(weights, delta_file.decode(data, base=weights))
        weights = step.new
        if header.parent is None or header.version is None or header.version - header.parent == 1:
            yield step  # several steps as one are a way to the others


def _random_bf16(rng: np.random.Generator, size: int) -> UInts:
    weights: UInts = (rng.standard_normal(size, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    return weights.astype(np.uint16)


def _read(path: Path) -> Weights:
    data = path.read_bytes()
    header = container.read_header(data)
    return {name: container.tensor(data, header, name) for name in header.entries}


def _step(old: Weights, delta: Delta) -> Step:
    new = old + delta
    flat = [np.concatenate([weights[name].data.view(np.uint16) for name in old]) for weights in (old, new)]
    return Step(old, new, *flat, delta)


class Timer:
    """Seconds of each kind of work, round by round."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._seconds = clock, dict[tuple[str, str], list[float]]()

    def time(self, name: str, way: str, work: Callable[[], Any]) -> Any:
        """Do it, and note how long it took."""
        started = self._clock()
        result = work()
        self._seconds.setdefault((name, way), []).append(self._clock() - started)
        return result

    def middle(self, name: str, way: str) -> float:
        """The median of the rounds."""
        return statistics.median(self._seconds[name, way])


def count(step: Step) -> None:
    """One compare pass."""
    for name, old in step.old.items():
        count_changed(old.data, step.new[name].data)


def measure(step: Step, codecs: list[Codec], rounds: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of a compare pass, and of each codec its name, bytes, shares of one pass, and whether it is exact. What
    is not ours is timed once: some takes hundreds of passes."""
    timer, rows = Timer(time.process_time), []
    for codec in (codec for _ in range(rounds) for codec in codecs if codec.name.startswith("deltawire")):
        timer.time("compare", "pass", lambda: count(step))
        _time(timer, codec)
    for codec in codecs:
        if not codec.name.startswith("deltawire"):
            _time(timer, codec)
        data = codec.encode()
        back = codec.decode(data)
        exact = back == step.delta if isinstance(back, Delta) else np.array_equal(back, step.flat_new)
        shares = {
            way: timer.middle("compare", "pass") / timer.middle(codec.name, way)
            for way in ("encode", "decode", "publish")
        }
        rows.append({"codec": codec.name, "bytes": codec.size(data) / step.delta.changed, **shares, "exact": exact})
    return timer.middle("compare", "pass"), rows


def _time(timer: Timer, codec: Codec) -> None:
    data = timer.time(codec.name, "encode", codec.encode)
    timer.time(codec.name, "decode", lambda: codec.decode(data))
    if codec.publish is not None:
        timer.time(codec.name, "publish", codec.publish)
    else:
        timer.time(codec.name, "publish", codec.encode)


def table(name: str, steps: list[Step], rounds: int, *, alone: bool) -> dict[str, Any]:
    """One trace: its first step timed, all of its steps sized."""
    elements = sum(bits.data.size for bits in steps[0].old.values())
    changed = sum(step.delta.changed for step in steps)
    others, missing = ([], {}) if alone else peers(steps[0])
    codecs = [*ours(steps[0]), *(() if alone else layouts(steps[0])), *others]
    seconds, rows = measure(steps[0], codecs, rounds)
    for row in rows:
        own = row["codec"].removeprefix("deltawire ")
        if own in delta_file.CODECS:
            total = sum(len(delta_file.encode(step.delta, codec=own, base=step.old)) for step in steps)
            row["all_steps"] = total / changed
    about = {"trace": name, "elements": elements, "steps": len(steps), "density": changed / len(steps) / elements}
    return {**about, "compare_ms": 1e3 * seconds, "load": os.getloadavg()[0], "rows": rows, "missing": missing}


def show(found: dict[str, Any]) -> None:
    """Print one trace's table."""
    print(f"\n{found['trace']}: {found['elements']:,} weights, {found['steps']} steps, {found['density']:.2%} changed")
    print(f"one compare pass {found['compare_ms']:.1f} ms; load {found['load']:.1f}\n")
    print(f"{'codec':18} {'B/change':>9} {'all steps':>9} {'encode':>8} {'decode':>8} {'publish':>8}  exact")
    for row in found["rows"]:
        every = f"{row['all_steps']:.3f}" if "all_steps" in row else ""
        shares = " ".join(f"{row[way]:8.4f}" for way in ("encode", "decode", "publish"))
        print(f"{row['codec']:18} {row['bytes']:9.3f} {every:>9} {shares}  {'yes' if row['exact'] else 'NO'}")
    for name, why in found["missing"].items():
        print(f"{name:18} {why}")
    rows = {row["codec"]: row for row in found["rows"]}
    if "z4ai" in rows:
        for codec in ("deltawire subset", "deltawire class"):
            own, peer = rows[codec], rows["z4ai"]
            times = [own[way] / peer[way] for way in ("encode", "decode")]
            print(f"{codec} encodes {times[0]:.0f} and decodes {times[1]:.0f} times as fast as z4ai")


def compare_cores(step: Step, rounds: int) -> None:
    """Print how many times as fast all cores are as one, in turn, by the clock on the wall. A bare compare pass in four
    parts says what the machine had to give."""
    every, one = os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}
    files = {codec: delta_file.encode(step.delta, codec=codec, base=step.old) for codec in FUSED}
    timer, quarter = Timer(time.perf_counter), -(-step.flat_old.size // 4)
    starts = range(0, step.flat_old.size, quarter)
    parts = [(step.flat_old[at : at + quarter], step.flat_new[at : at + quarter]) for at in starts]
    for _ in range(rounds):
        for way, usable in (("one", one), ("all", every)):
            os.sched_setaffinity(0, usable)
            timer.time("compare pass", way, lambda: list(threads.run(lambda pair: count_changed(*pair), parts)))
            for codec in FUSED:
                timer.time(
                    f"encode {codec}", way, lambda c=codec: delta_file.encode(step.delta, codec=c, base=step.old)
                )
                timer.time(f"decode {codec}", way, lambda c=codec: delta_file.decode(files[c], base=step.old))
                timer.time(f"publish {codec}", way, lambda c=codec: publish(step, c))
    print(f"{len(every)} cores against one, medians of {rounds} rounds in turn; load {os.getloadavg()[0]:.1f}")
    works = [f"{work} {codec}" for codec in FUSED for work in ("encode", "decode", "publish")]
    for name in ("compare pass", *works):
        one_s, all_s = timer.middle(name, "one"), timer.middle(name, "all")
        print(f"{name:15} {1e3 * one_s:7.1f} ms on one, {1e3 * all_s:7.1f} ms on all: {one_s / all_s:.2f} times")


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, default=[RANDOM])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--ours", action="store_true", help="measure deltawire's codecs alone")
    parser.add_argument("--threads", action="store_true", help="measure one core against all")
    options = parser.parse_args()
    kernels.warm_up()
    if options.threads:
        compare_cores(next(steps_of(options.traces[0])), options.rounds)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tables = []
    for trace in options.traces:
        name = "random weights" if trace == RANDOM else trace.resolve().name
        tables.append(table(name, list(steps_of(trace)), options.rounds, alone=options.ours))
        show(tables[-1])
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
