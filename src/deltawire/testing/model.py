"""A small model of random bits, and its optimizer steps: what a simulated trainer trains."""

from random import Random

import numpy as np

from deltawire.weights.bits import Bits, unsigned
from deltawire.weights.table import TensorEntry

SHAPES = {
    "embed": ("BF16", (24, 4)),
    "layer.weight": ("BF16", (8, 4)),
    "layer.bias": ("F32", (8,)),
    "norm": ("BF16", ()),
}
TABLE = tuple(TensorEntry(name, dtype, shape) for name, (dtype, shape) in SHAPES.items())
Weights = dict[str, Bits]


def first_weights(draw: Random) -> Weights:
    """Random bits, so NaN and -0.0 among them."""
    rng = np.random.default_rng(draw.randrange(2**32))
    found = {}
    for name, (dtype, shape) in SHAPES.items():
        kind = unsigned(dtype)
        found[name] = Bits(dtype, shape, rng.integers(0, np.iinfo(kind).max, int(np.prod(shape)), kind, endpoint=True))
    return found


def edit(weights: Weights, draw: Random) -> None:
    """An optimizer step: a few elements of some tensors, in place."""
    for name in draw.sample(sorted(weights), draw.randrange(1, len(weights) + 1)):
        data = weights[name].data
        for position in {draw.randrange(data.size) for _ in range(3)}:
            data[position] ^= data.dtype.type(1 << draw.randrange(8 * data.itemsize))


def copied(weights: Weights) -> Weights:
    """The same bits in memory of their own."""
    return {name: bits.copy() for name, bits in weights.items()}
