"""How many bytes a change takes in each codec, and how long it takes, as a share of one pass that only compares.

    python benchmarks/codecs.py [TRACE …] [--rounds 9] [--json FILE] [--ours] [--seconds 240] [--memory 8]
    python benchmarks/codecs.py --threads

A trace is a folder of `base.safetensors` (or a checkpoint's `model.safetensors`) and of delta files, as
`benchmarks/traces.py` makes them; `random` is 100 million random weights that change by 1 %, and so is no trace. Ours
are files with their headers. What the extra `bench` installs is measured beside them, as are six bytes a change
(position and value) and XOR with zstd.

Each codec is measured on the first step, in a process of its own, in turn with compare passes. It has so many seconds
and GiB of memory, and where that does not do, the table says so. A share of 0.30 says: as long as 3.3 compare passes.
`publish` compares and encodes, from old and new weights to the file. One core; CPU time, medians of all rounds.

`--threads` measures one core against all that this process may use, in turn, by the clock on the wall, in rounds
during which the machine did little else. `benchmarks/codecs_plot.py` draws what `--json` wrote.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from compare_pass import count_changed, count_often
from deltawire.format import delta_file
from deltawire.format.codecs import fused
from deltawire.weights import kernels, threads
from deltawire.weights.delta import Delta
from measuring import WAYS, Codec, Timer, measure
from peers import PEERS
from steps import RANDOM, Step, steps_of

FUSED = ("subset", "class")
OWN = "deltawire "
NEAR = 1 << 15
"""elements of two arrays that a core's own cache holds"""
PATIENCE = 1 / 4
"""share of a codec's time after which no further round of it begins"""


def own(step: Step, codec: str) -> Codec:
    """A codec of deltawire."""
    return Codec(
        lambda: delta_file.encode(step.delta, codec=codec, base=step.old),
        lambda data: delta_file.decode(data, base=step.old),
        publish=lambda: publish(step, codec),
    )


def publish(step: Step, codec: str) -> bytes:
    """The file of a step, from the weights before and after it."""
    if codec not in FUSED:
        return delta_file.encode(Delta.between(step.old, step.new), codec=codec, base=step.old)
    made = {name: fused.compare(old, step.new[name], by_class=codec == "class") for name, old in step.old.items()}
    delta = Delta({name: change for name, (change, _) in made.items()})
    return delta_file.encode(delta, codec=codec, coded={name: coded for name, (_, coded) in made.items()})


OURS: dict[str, Callable[[Step], Codec]] = {OWN + codec: partial(own, codec=codec) for codec in delta_file.CODECS}
EVERY = OURS | PEERS


def measure_here(name: str, options: argparse.Namespace) -> None:
    """Measure one codec in this process, and print a JSON line."""
    limit = int(options.memory * (1 << 30))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    step = next(steps_of(options.traces[0]))
    row = measure(step, EVERY[name](step), options.rounds, PATIENCE * options.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(json.dumps({"codec": name, **row, "peak_gib": peak}))


def measure_apart(name: str, trace: Path, options: argparse.Namespace) -> dict[str, Any] | str:
    """One codec's row, measured in a process of its own; or why there is none."""
    limits = [f"--{limit}={getattr(options, limit)}" for limit in ("rounds", "seconds", "memory")]
    command = [sys.executable, __file__, str(trace), "--only", name, *limits]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.seconds)
    except subprocess.TimeoutExpired:
        return f"not finished in {options.seconds:g} s"
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if "ModuleNotFoundError" in last:
        return f"not installed ({last.partition(': ')[2]}): pip install 'deltawire[bench]'"
    return f"failed (status {done.returncode}, at most {options.memory:g} GiB of memory): {last[:80]}"


def table(trace: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One trace: its first step timed, all of its steps sized with our codecs."""
    elements = changed = steps = 0
    total = dict.fromkeys(delta_file.CODECS, 0)
    for step in steps_of(trace):
        elements, changed, steps = step.flat_old.size, changed + step.delta.changed, steps + 1
        for codec in total:
            total[codec] += len(delta_file.encode(step.delta, codec=codec, base=step.old))
    rows, missing, load = [], {}, os.getloadavg()[0]
    for name in OURS if options.ours else EVERY:
        found = measure_apart(name, trace, options)
        if isinstance(found, str):
            missing[name] = found
        elif name in OURS:
            rows.append({**found, "all_steps": total[name.removeprefix(OWN)] / changed})
        else:
            rows.append(found)
    return {
        "trace": "random weights" if trace == RANDOM else trace.resolve().name,
        "elements": elements,
        "steps": steps,
        "density": changed / steps / elements,
        "compare_ms": statistics.median([row["compare_ms"] for row in rows] or [0.0]),
        "load": [load, os.getloadavg()[0]],
        "rows": rows,
        "missing": missing,
    }


def show(found: dict[str, Any]) -> None:
    """Print one trace's table."""
    print(f"\n{found['trace']}: {found['elements']:,} weights, {found['steps']} steps, {found['density']:.2%} changed")
    print("one compare pass {:.1f} ms; load {:.1f} to {:.1f}\n".format(found["compare_ms"], *found["load"]))
    print(
        f"{'codec':18} {'B/change':>9} {'all steps':>9} {'encode':>8} {'decode':>8} {'publish':>8}  exact  peak, rounds"
    )
    for row in found["rows"]:
        every = f"{row['all_steps']:.3f}" if "all_steps" in row else ""
        shares = " ".join(f"{row[way]:8.4f}" for way in WAYS)
        exact, more = "yes" if row["exact"] else "NO", f"{row['peak_gib']:.1f} GiB, {row['rounds']}"
        print(f"{row['codec']:18} {row['bytes']:9.3f} {every:>9} {shares}  {exact:6} {more}")
    for name, why in found["missing"].items():
        print(f"{name:18} {why}")
    rows = {row["codec"]: row for row in found["rows"]}
    others = {name: row["bytes"] for name, row in rows.items() if name in PEERS}
    for codec in FUSED:
        if (mine := rows.get(OWN + codec)) is None:
            continue
        if "z4ai" in rows:
            times = [mine[way] / rows["z4ai"][way] for way in ("encode", "decode")]
            print(f"{codec} encodes {times[0]:.0f} and decodes {times[1]:.1f} times as fast as z4ai")
        if others:
            best = min(others, key=lambda name: others[name])
            print(f"{best} takes {others[best] / mine['bytes']:.2f} times the bytes of {codec}")


def compare_cores(step: Step, options: argparse.Namespace) -> None:
    """Print how many times as fast all cores are as one, in turn, by the clock on the wall. Rounds in which others had
    more than a tenth of the cores are left out. Two compare passes say what the machine had to give: one of the whole
    weights, which wait for memory, and one again and again of what a core's own cache holds."""
    every, one = os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}
    works, quiet, began = works_of(step), 0, time.perf_counter()
    timers, dropped = {"one": Timer(time.perf_counter), "all": Timer(time.perf_counter)}, 0
    while quiet < options.rounds and time.perf_counter() - began < options.seconds:
        round_of = {"one": Timer(time.perf_counter), "all": Timer(time.perf_counter)}
        started, busy, own_time = time.perf_counter(), busy_seconds(), time.process_time()
        for way, usable in (("one", one), ("all", every)):
            os.sched_setaffinity(0, usable)
            for name, work in works.items():
                round_of[way].time(name, work)
        others = busy_seconds() - busy - (time.process_time() - own_time)
        if others > (time.perf_counter() - started) * len(every) / 10:
            dropped += 1
            continue
        quiet += 1
        for way, timer in timers.items():
            timer.add(round_of[way])
    print(f"{len(every)} cores against one, medians of {quiet} quiet rounds in turn, {dropped} were not quiet")
    print(f"load {os.getloadavg()[0]:.1f}")
    for name in works if quiet else ():
        one_s, all_s = (timers[way].middle(name) for way in ("one", "all"))
        print(f"{name:20} {1e3 * one_s:7.1f} ms on one, {1e3 * all_s:7.1f} ms on all: {one_s / all_s:.2f} times")


def works_of(step: Step) -> dict[str, Callable[[], Any]]:
    """What is measured on one core and on all."""
    files = {codec: delta_file.encode(step.delta, codec=codec, base=step.old) for codec in FUSED}
    quarter = -(-step.flat_old.size // 4)
    starts = range(0, step.flat_old.size, quarter)
    parts = [(step.flat_old[at : at + quarter], step.flat_new[at : at + quarter]) for at in starts]
    near = [(step.flat_old[at : at + NEAR].copy(), step.flat_new[at : at + NEAR].copy()) for at in starts]
    works: dict[str, Callable[[], Any]] = {
        "compare in cache": lambda: list(threads.run(lambda pair: count_often(*pair, 4 * quarter // NEAR), near)),
        "compare pass": lambda: list(threads.run(lambda pair: count_changed(*pair), parts)),
    }
    for codec in FUSED:
        works[f"encode {codec}"] = partial(delta_file.encode, step.delta, codec=codec, base=step.old)
        works[f"decode {codec}"] = partial(delta_file.decode, files[codec], base=step.old)
        works[f"publish {codec}"] = partial(publish, step, codec)
    return works


def busy_seconds() -> float:
    """What all processes of this machine have had of its cores."""
    user, nice, system, _, _, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, default=[RANDOM])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--ours", action="store_true", help="measure deltawire's codecs alone")
    parser.add_argument("--seconds", type=float, default=240.0, help="that each codec has, to read the trace too")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that each codec has")
    parser.add_argument("--only", choices=EVERY, help="measure one codec in this process, and print a JSON line")
    parser.add_argument("--threads", action="store_true", help="measure one core against all")
    options = parser.parse_args()
    if options.threads:
        kernels.warm_up()
        compare_cores(next(steps_of(options.traces[0])), options)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.only:
        measure_here(options.only, options)
        return
    tables = []
    for trace in options.traces:
        tables.append(table(trace, options))
        show(tables[-1])
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
