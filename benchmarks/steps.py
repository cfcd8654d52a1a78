"""The steps of a trace: weights before and after each, and what changed. Random weights are one, too."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltawire.format import container, delta_file
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.delta import Delta

Weights = dict[str, Bits]
RANDOM = Path("random")


class Step(NamedTuple):
    """One step of a trace: the weights before and after, by name and end to end, and the change."""

    old: Weights
    new: Weights
    flat_old: UInts
    flat_new: UInts
    delta: Delta


def steps_of(trace: Path) -> Iterator[Step]:
    """The steps of a trace, or one of random weights."""
    if trace == RANDOM:
        yield _random_step()
        return
    base = next(path for name in ("base.safetensors", "model.safetensors") if (path := trace / name).exists())
    weights = _read(base)
    for path in sorted([*trace.glob("step_*.safetensors"), *trace.glob("delta_*.safetensors")]):
        data = path.read_bytes()
        header, step = delta_file.read_header(data), _step(weights, delta_file.decode(data, base=weights))
        weights = step.new
        if header.parent is None or header.version is None or header.version - header.parent == 1:
            yield step  # several steps as one are a way to the others


def _random_step() -> Step:
    rng = np.random.default_rng(0)
    old = {"w": Bits("BF16", (100_000, 1000), _random_bf16(rng, 100_000_000))}
    new = {"w": old["w"].copy()}
    exponents = (old["w"].data >> 7 & 255).astype(np.int64)
    chance = np.minimum(2.0 ** (111.75 - exponents), 1)  # a change of one size crosses small weights' cells oftener
    where = np.flatnonzero(rng.random(exponents.size) < chance)
    steps = np.array([1, 65535, 2, 65534], np.uint16)
    new["w"].data[where] += rng.choice(steps, where.size, p=[0.45, 0.45, 0.05, 0.05])
    return _step(old, Delta.between(old, new))


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
