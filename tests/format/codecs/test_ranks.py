"""Changes that were ranked on a device are encoded to the bytes that the old bits give on the host."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import changed, random_bits, seeds

from deltawire.format import body
from deltawire.format.codecs import ranks, subset, tiles, twins
from deltawire.format.codecs.classes import SCHEMES
from deltawire.format.codecs.live_rows import few_live_rows
from deltawire.weights.bits import Bits
from deltawire.weights.delta import between_bits

DEVICE = os.environ.get("DELTAWIRE_TEST_DEVICE", "cpu")
WIDTHS = {1: ["F8_E4M3", "F8_E5M2"], 2: ["BF16", "F16"], 4: ["F32"], 8: ["F64"]}
SHAPES = [(), (1,), (700,), (5, 13), (64, 40), (3, 4, 50), (300, 4)]
HOW = ["a few by one", "half", "everything", "first and last", "anything", "few rows", "nothing"]


def carrier(bits: Bits) -> torch.Tensor:
    kind = "u1" if bits.data.itemsize == 1 else f"i{bits.data.itemsize}"
    return torch.from_numpy(bits.data.view(kind).copy()).to(DEVICE)


def rows_changed(rng: np.random.Generator, old: Bits) -> Bits:
    """A later version, in which all changes are in a fifth of the rows."""
    new = old.copy()
    rows, columns = tiles.matrix(old.shape)
    where = np.outer(rng.random(rows) < 0.2, rng.random(columns) < 0.7).reshape(-1)
    new.data[where] += new.data.dtype.type(3)
    return new


@st.composite
def versions(draw):
    """Tensors of one width before and after a change, and the tiles of each."""
    rng = np.random.default_rng(draw(seeds))
    found = []
    for number in range(draw(st.integers(1, 4))):
        shape, how = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(HOW))
        dtypes = WIDTHS[draw(st.shared(st.sampled_from([*WIDTHS])))]
        old = random_bits(rng, draw(st.sampled_from(dtypes)), shape)
        new = rows_changed(rng, old) if how == "few rows" else changed(rng, old, how)
        rows, columns = tiles.matrix(shape)
        tile = draw(st.sampled_from([rows, 7, 1])), draw(st.sampled_from([columns, 16, 5]))
        found.append((f"tensor.{number}", old, new, tile))
    return found


def require_same(found) -> list:
    """The entries, once they are those of the host."""
    deltas = {name: between_bits(old, new) for name, old, new, _ in found}
    asked = [
        ranks.ToRank(name, old.dtype, old.shape, carrier(old), tile, deltas[name].changed)
        for name, old, _, tile in found
        if deltas[name].changed
    ]
    if not asked:
        return []
    positions = torch.from_numpy(np.concatenate([deltas[own.name].sparse()[0] for own in asked])).to(DEVICE)
    ranked = ranks.rank(asked, positions)
    rankings = ranked.rankings([array.cpu().numpy() for array in ranked.arrays()])
    coded = body.encode_ranked(deltas, rankings)
    for name, old, _, tile in found:
        if name not in coded:
            assert not deltas[name].changed
            continue
        expected = subset.encode(deltas[name], old.data, tile=tile, twin=twins.plain)
        own = coded[name]
        assert own.payload.tobytes() == expected.payload.tobytes()
        assert (own.tile, own.by_class, own.entries) == (expected.tile, True, expected.entries) or [
            (entry.nbytes, entry.dead, entry.lists) for entry in own.entries
        ] == [(entry.nbytes, entry.dead, entry.lists) for entry in expected.entries]
    return [entry for own in coded.values() for entry in own.entries]


@given(versions())
@settings(max_examples=25)
def test_what_a_device_ranked_is_encoded_as_the_old_bits_are(found):
    require_same(found)


def test_a_tile_without_the_rows_in_which_nothing_changes_is_ranked_among_the_others():
    rng = np.random.default_rng(3)
    old = random_bits(rng, "BF16", (400, 64))
    entries = require_same(
        [
            ("whole", old, rows_changed(rng, old), (400, 64)),
            ("tiles", old, rows_changed(rng, old), (100, 32)),
        ]
    )
    assert all(entry.dead for entry in entries)
    assert len(entries) == 1 + 8


@given(st.integers(1, 50), st.integers(1, 40), st.floats(0.001, 0.9), seeds)
def test_no_tile_is_tried_without_idle_rows_that_was_not_ranked_so(rows, columns, share, seed):
    tile = tiles.Tile(0, 0, rows, columns, columns)
    positions = np.flatnonzero(np.random.default_rng(seed).random(tile.size) < share)
    live = np.unique(positions // columns).size
    found = few_live_rows(tile, positions, -(-positions.size // 8), twins.plain) if positions.size else None
    assert found is None or ranks.may_be_few(rows, live, positions.size)


@pytest.mark.parametrize("dtype", SCHEMES)
def test_every_bit_pattern_has_the_class_that_the_host_gives_it(dtype):
    rng = np.random.default_rng(0)
    old = random_bits(rng, dtype, (1 << 12,))
    old.data[:256] = np.arange(256, dtype=old.data.dtype) << (8 * old.data.itemsize - 8)
    require_same([("w", old, changed(rng, old, "everything"), (1, 700))])
