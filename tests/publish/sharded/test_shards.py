"""What ranks hold of a view of a tensor, and of its digest: together they are all of it, once."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltawire.prepare.names import View
from deltawire.publish.sharded.shards import Shard, part_digest
from deltawire.weights.digest import MODULUS, digest_bits
from deltawire.weights.tensors import as_bits


def slices(shard):
    return tuple(slice(at, at + length) for at, length in zip(shard.offset, shard.shape, strict=True))


@st.composite
def views(draw):
    """A view with at least one dimension, perhaps turned, of a tensor of up to four dimensions, and the shards of some
    ranks that together hold each of its elements once; some shards may be empty."""
    whole = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    box = tuple(tuple(sorted(draw(st.tuples(*[st.integers(0, length)] * 2)))) for length in whole)
    thin = [dim for dim, (start, stop) in enumerate(box) if stop - start == 1]
    dropped = draw(st.sets(st.sampled_from(thin), max_size=len(whole) - 1)) if thin else set()
    dims = draw(st.permutations([dim for dim in range(len(whole)) if dim not in dropped]))
    cuts = [sorted([0, length, *draw(st.lists(st.integers(0, length), max_size=2))]) for length in whole]
    ranks = [
        Shard(whole, tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends), None, True, 3)
        for ends in product(*(pairwise(cut) for cut in cuts))
    ]
    return View("w", box, tuple(dims)), ranks


@given(views(), st.sampled_from([np.asarray, torch.from_numpy]))
def test_what_all_ranks_hold_of_a_view_is_the_view_once_and_in_the_memory_of_their_shards(drawn, make):
    view, ranks = drawn
    whole = np.random.default_rng(5).normal(size=ranks[0].whole).astype(np.float32)
    right, digest = as_bits(view.of(whole)), 0
    found, times = np.zeros_like(right.data), np.zeros(right.data.size, int)
    for shard in ranks:
        held = make(whole[slices(shard)].copy())
        part = replace(shard, tensor=held).through(view)
        bits = as_bits(part.tensor)
        assert (part.whole, part.box.shape, part.owned, part.copies) == (right.shape, bits.shape, True, 3)
        assert not bits.data.size or np.shares_memory(np.asarray(part.tensor), np.asarray(held))
        assert bits == part.box.cut(right)
        places = part.box.positions(np.arange(bits.data.size))
        found[places], digest = bits.data, digest + part.box.digest(bits.data)
        times[places] += 1
    assert (times == 1).all()
    assert found.tolist() == right.data.tolist()
    assert digest % MODULUS == digest_bits(right.data)


@given(st.integers(0, 40), st.integers(1, 6))
def test_the_parts_of_all_ranks_add_up_to_the_digest(elements, ranks):
    data = np.random.default_rng(4).integers(0, 1 << 16, elements, np.uint16)
    assert sum(part_digest(data, rank, ranks) for rank in range(ranks)) % MODULUS == digest_bits(data)
