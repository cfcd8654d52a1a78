"""How many bytes a change takes in each codec, and how long it takes, as a share of one pass that only compares.

    python benchmarks/codecs.py [TRACE …] [--rounds 9]

A trace is a folder of `base.safetensors` (or a checkpoint's `model.safetensors`) and of delta files, as
`benchmarks/traces.py` makes them; without one, 100 million random weights change by 1 %. Ours are files with their
headers. What the extra `bench` installs is measured beside them, as are six bytes a change (position and value) and
XOR with zstd. A share of 0.30 says: as long as 3.3 compare passes of the same run. `publish` collects what changed and
encodes it. One core; CPU time, medians of all rounds.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from compare_pass import count_changed
from deltawire.format import container, delta_file
from deltawire.weights import kernels
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.delta import Delta

Weights = dict[str, Bits]


class Codec(NamedTuple):
    """Encode gives bytes; decode gives the delta, or the new weights end to end."""

    name: str
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int] = len


class Step(NamedTuple):
    """One step of a trace: the weights before and after, by name and end to end, and the change."""

    old: Weights
    new: Weights
    flat_old: UInts
    flat_new: UInts
    delta: Delta


def ours(step: Step) -> Iterator[Codec]:
    """Every codec of deltawire."""
    for codec in delta_file.CODECS:
        yield Codec(
            f"deltawire {codec}",
            lambda codec=codec: delta_file.encode(step.delta, codec=codec, base=step.old),
            lambda data: delta_file.decode(data, base=step.old),
        )


def layouts(step: Step) -> Iterator[Codec]:
    """What needs no package: six bytes a change, as vLLM, verl and TRL send it, and XOR with zstd."""

    def six() -> list[tuple[UInts, UInts]]:
        found = ((delta.sparse()[0], step.new[name].data) for name, delta in step.delta.items())
        return [(positions.astype(np.int32), new[positions]) for positions, new in found]

    def put(changes: list[tuple[UInts, UInts]]) -> UInts:
        new = {name: bits.data.copy() for name, bits in step.old.items()}
        for name, (positions, values) in zip(step.delta, changes, strict=True):
            new[name][positions] = values
        return np.concatenate(list(new.values()))

    yield Codec("6 bytes a change", six, put, lambda found: sum(a.nbytes + b.nbytes for a, b in found))
    yield Codec(
        "XOR + zstd-1",
        lambda: zstandard.ZstdCompressor(1).compress((step.flat_old ^ step.flat_new).data),
        lambda data: np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint16) ^ step.flat_old,
    )


def peers(step: Step) -> Iterator[Codec]:
    """What pip brings, where it is installed."""
    old, new = step.flat_old.tobytes(), step.flat_new.tobytes()
    if importlib.util.find_spec("z4ai"):
        import z4ai.delta

        yield Codec(
            "z4ai",
            lambda: z4ai.delta.compress(new, reference=old, dtype="bf16"),
            lambda data: np.frombuffer(z4ai.delta.decompress(data, reference=old), np.uint16),
        )
    if importlib.util.find_spec("zipnn"):
        import zipnn

        options = {"bytearray_dtype": "bfloat16", "input_format": "byte", "delta_compressed_type": "byte"}
        yield Codec(
            "zipnn",
            lambda: zipnn.ZipNN(**options).compress(new, delta_second_data=old),
            lambda data: np.frombuffer(zipnn.ZipNN(**options).decompress(data, delta_second_data=old), np.uint16),
        )


def steps_of(trace: Path | None) -> Iterator[Step]:
    """The steps of a trace, or one of random weights."""
    if trace is None:
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


def measure(step: Step, rounds: int) -> tuple[float, float, list[tuple[str, int, float, float, bool]]]:
    """Seconds of a compare pass, and of one that collects what changed; of each codec its name, bytes, shares of encode
    and decode, and whether it is exact."""
    codecs = [*ours(step), *layouts(step), *peers(step)]
    seconds: dict[tuple[str, str], list[float]] = {}
    results: dict[str, Any] = {}

    def timed(key: tuple[str, str], work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        seconds.setdefault(key, []).append(time.process_time() - started)
        return result

    for _ in range(rounds):
        for name, old in step.old.items():
            pair = (old.data, step.new[name].data)
            timed(("compare", name), lambda pair=pair: count_changed(*pair))
            timed(("collect", name), lambda pair=pair: kernels.compare_and_collect(*pair))
        for codec in codecs:
            if len(seconds.get((codec.name, "encode"), ())) >= 1 and not codec.name.startswith("deltawire"):
                continue  # others are timed once: some take hundreds of passes
            data = timed((codec.name, "encode"), codec.encode)
            back = timed((codec.name, "decode"), lambda codec=codec, data=data: codec.decode(data))
            exact = back == step.delta if isinstance(back, Delta) else np.array_equal(back, step.flat_new)
            results[codec.name] = (codec.size(data), exact)
    middle = {key: statistics.median(took) for key, took in seconds.items()}
    passes = [sum(took for (kind, _), took in middle.items() if kind == way) for way in ("compare", "collect")]
    rows = []
    for codec in codecs:
        size, exact = results[codec.name]
        shares = [passes[0] / middle[codec.name, way] for way in ("encode", "decode")]
        rows.append((codec.name, size, *shares, exact))
    return passes[0], passes[1], rows


def main() -> None:
    """Print a table for each trace: its first step timed, all of its steps sized."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kernels.warm_up()
    for trace in options.traces or [None]:
        report(trace.name if trace else "random weights", list(steps_of(trace)), options.rounds)


def report(name: str, steps: list[Step], rounds: int) -> None:
    """Print one trace's table."""
    elements = sum(bits.data.size for bits in steps[0].old.values())
    changed = sum(step.delta.changed for step in steps)
    compare, collect, rows = measure(steps[0], rounds)
    share = changed / len(steps) / elements
    print(f"\n{name}: {elements:,} weights, {len(steps)} steps, {share:.2%} changed a step")
    print(f"one compare pass {1e3 * compare:.1f} ms; collecting what changed: {compare / collect:.2f} of its speed\n")
    print(f"{'codec':20} {'B/change':>9} {'all steps':>9} {'encode':>8} {'decode':>8} {'publish':>8}  exact")
    for codec, size, encode, decode, exact in rows:
        own = codec.removeprefix("deltawire ")
        every = ""
        if own in delta_file.CODECS:
            total = sum(len(delta_file.encode(step.delta, codec=own, base=step.old)) for step in steps)
            every = f"{total / changed:.3f}"
        sizes = f"{size / steps[0].delta.changed:9.3f} {every:>9}"
        publish = compare / (collect + compare / encode)
        print(f"{codec:20} {sizes} {encode:8.3f} {decode:8.3f} {publish:8.3f}  {'yes' if exact else 'NO'}")


if __name__ == "__main__":
    main()
