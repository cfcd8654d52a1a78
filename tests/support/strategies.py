"""Weights for property tests: every dtype, the bit patterns that break arithmetic, and changes of every density."""

import numpy as np
from hypothesis import strategies as st

from deltawire.weights.bits import WIDTHS, Bits, count, unsigned

SHAPES = [(), (0,), (3, 0, 2), (1,), (2,), (7,), (5, 13), (64,), (65,), (4, 8, 9), (300,), (2000,)]
"""scalar, zero-size, tiny, around the limits of the codecs' choices, and long enough for gaps of more than a byte"""
SPECIAL = {
    "F8_E4M3": [0x80, 0x7F, 0xFF],  # -0.0 and both NaN
    "F8_E5M2": [0x80, 0x7C, 0xFC, 0x7D, 0xFF],  # -0.0, infinities, NaN payloads
    "F16": [0x8000, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF],
    "BF16": [0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF],
    "F32": [0x8000_0000, 0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FC0_BEEF],
    "F64": [1 << 63, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, (0x7FF8 << 48) + 0xBEEF],
}
"""-0.0, infinities and NaN payloads, as bits"""
CHANGES = ["nothing", "everything", "first", "last", "first and last", "a few by one", "half", "anything"]

dtypes = st.sampled_from(sorted(WIDTHS))
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**32 - 1)


def random_bits(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Bits:
    """Uniform bits with a tenth of special values; a bool stays 0 or 1."""
    size, kind = count(shape), unsigned(dtype)
    data = rng.integers(0, 2 if dtype == "BOOL" else np.iinfo(kind).max, size, kind, endpoint=dtype != "BOOL")
    if special := SPECIAL.get(dtype):
        where = rng.random(size) < 0.1
        data[where] = rng.choice(np.array(special, kind), int(where.sum()))
    return Bits(dtype, shape, data)


def changed(rng: np.random.Generator, old: Bits, how: str) -> Bits:
    """A later version of `old`. Only "nothing" and an empty tensor are sure to change nothing."""
    new = old.copy()
    size = new.data.size
    where = {
        "nothing": np.zeros(size, bool),
        "everything": np.ones(size, bool),
        "first": np.arange(size) == 0,
        "last": np.arange(size) == size - 1,
        "first and last": (np.arange(size) == 0) | (np.arange(size) == size - 1),
        "a few by one": rng.random(size) < 0.02,
        "half": rng.random(size) < 0.5,
        "anything": rng.random(size) < rng.random(),
    }[how]
    if old.dtype == "BOOL":
        new.data[where] ^= 1
    elif how == "anything":
        new.data[where] = random_bits(rng, old.dtype, (int(where.sum()),)).data
    else:
        new.data[where] += rng.choice(np.array([1, -1]), int(where.sum())).astype(new.data.dtype)
    return new


@st.composite
def pairs(draw: st.DrawFn, dtype: str | None = None) -> tuple[Bits, Bits]:
    """One tensor before and after a change."""
    rng = np.random.default_rng(draw(seeds))
    old = random_bits(rng, dtype or draw(dtypes), draw(shapes))
    return old, changed(rng, old, draw(st.sampled_from(CHANGES)))


@st.composite
def versions(draw: st.DrawFn, n: int = 2) -> list[dict[str, Bits]]:
    """`n` consecutive versions of one set of up to six tensors, the last sometimes back at the first's bits."""
    rng = np.random.default_rng(draw(seeds))
    kinds = draw(st.lists(st.tuples(dtypes, shapes), max_size=6))
    chain = [{f"layer.{i}.ωeight": random_bits(rng, *kind) for i, kind in enumerate(kinds)}]
    for _ in range(n - 1):
        chain.append({name: changed(rng, old, draw(st.sampled_from(CHANGES))) for name, old in chain[-1].items()})
    if draw(st.booleans()):
        chain[-1] = {name: bits.copy() for name, bits in chain[0].items()}
    return chain


def every_dtype_far_apart() -> tuple[dict[str, Bits], dict[str, Bits]]:
    """One tensor of 70,000 elements per dtype, few changes, gaps of 254, 255, 256 and more than 65,535."""
    rng = np.random.default_rng(0)
    old = {f"model.{dtype}": random_bits(rng, dtype, (70, 1000)) for dtype in WIDTHS}
    new = {name: bits.copy() for name, bits in old.items()}
    for bits in new.values():
        bits.data[np.array([0, 255, 511, 768, 69_999])] ^= 1
    return old, new
