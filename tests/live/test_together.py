"""An accelerator's weights come to hold what host memory holds after the same change, with the same digests."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_digests import places

from deltawire.errors import DtypeMismatch
from deltawire.live import accelerator, changes, together, writes
from deltawire.live.accelerator import Accelerators
from deltawire.live.arena import LEAST
from deltawire.live.boxes import LiveBox
from deltawire.live.changes import LiveChanges
from deltawire.live.digests import Place
from deltawire.live.memory import Memory
from deltawire.weights.delta import settle
from deltawire.weights.digest import MODULUS
from deltawire.weights.kept import Kept

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
BYTES = 8 * 5000
ROOM = 1 << 16


@st.composite
def updates(draw):
    """A dtype, where tensors of it lie, and each one's change."""
    dtype = draw(st.sampled_from([*DTYPES]))
    width = DTYPES[dtype].itemsize
    parts = []
    for box in draw(st.lists(places(), min_size=1, max_size=4)):
        total = int(box.at(np.arange(box.size))[0][-1]) + draw(st.integers(1, 4))
        random = np.random.default_rng(draw(st.integers(0, 1000)))
        positions = np.flatnonzero(random.random(total) < draw(st.sampled_from([0, 0.05, 0.9])))
        increments = random.integers(1, 256, (positions.size, width), np.uint8).view(f"<u{width}").reshape(-1)
        parts.append((box, Kept((total,), [box.part]).cut(settle(dtype, (total,), positions, increments))))
    return dtype, parts


def changed(dtype, parts, accelerators):
    """What changing the tensors does to storages of their own: to digests, and to bytes before, after and put back."""
    storages = [torch.from_numpy(np.random.default_rng(7).integers(0, 256, BYTES, np.uint8)) for _ in parts]
    own = LiveChanges()
    for number, ((box, tensor), storage) in enumerate(zip(parts, storages, strict=True)):
        live = storage.view(DTYPES[dtype])
        own.add(number, Place(Memory(live, 0, accelerators.of(live.device)), box), tensor)
    own.finish()
    seen = [[storage.clone() for storage in storages]]
    for act in (writes.apply, writes.undo):
        act(own.writes)
        seen.append([storage.clone() for storage in storages])
    return {part: (made.after - made.before) % MODULUS for part, made in own.moved.items()}, seen


@given(update=updates(), size=st.sampled_from([0, LEAST, ROOM]), few=st.sampled_from([0, 1 << 20]), far=st.booleans())
@settings(max_examples=25)
def test_a_change_of_several_tensors_does_the_same_on_an_accelerator(update, size, few, far):
    on_host, expected = changed(*update, Accelerators())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accelerator, "ON_HOST", frozenset())
        patched.setattr(changes, "FEW", few)
        if far:  # as where a tensor has more than 2^31 elements
            patched.setattr(together, "positions_for", lambda sizes: torch.int64)
        moved, seen = changed(*update, Accelerators(size))
    assert moved == on_host
    for storages, own in zip(expected, seen, strict=True):
        assert all(map(torch.equal, storages, own))
    assert all(map(torch.equal, seen[0], seen[2]))


@given(counts=st.lists(st.integers(0, 9), max_size=8), most=st.integers(1, 12))
def test_elements_are_cut_into_parts_that_fit_and_know_whose_they_are(counts, most):
    owners = np.repeat(np.arange(len(counts)), counts)
    found = []
    for cut in together._cuts(counts, most):
        assert sum(cut.counts) == cut.all.stop - cut.all.start <= most
        found += np.repeat(cut.places, cut.counts).tolist()
    assert found == owners.tolist()


@pytest.mark.parametrize("size", [0, LEAST])
def test_a_value_that_narrower_weights_cannot_hold_is_refused_on_an_accelerator_before_anything_moves(
    size, on_accelerator
):
    live = torch.zeros(100, dtype=torch.bfloat16, device=on_accelerator)
    memory = Memory(live, -16, Accelerators(size).of(live.device))
    box = LiveBox((100,), 0, (1,), "w", 0, (1,))
    own = LiveChanges()
    fits = settle("F32", (100,), np.array([3]), np.array([1 << 16], np.uint32))
    own.add("fits", Place(memory, box), fits)
    with pytest.raises(DtypeMismatch, match="1 values need more than the 16 bits"):
        own.add("not", Place(memory, box), settle("F32", (100,), np.array([5]), np.array([1], np.uint32)))
    assert not live.any()
    own.finish()
    writes.apply(own.writes)
    assert live.view(torch.int16).nonzero().tolist() == [[3]]
