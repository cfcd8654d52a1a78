"""Digests of live memory are those of the checkpoint's tensors, however they lie and whatever holds them."""

import itertools
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltawire.live import accelerator, digests
from deltawire.live.accelerator import Accelerators
from deltawire.live.arena import LEAST
from deltawire.live.boxes import LiveBox
from deltawire.live.digests import Place, digests_of, fingerprints
from deltawire.live.memory import Memory, to_host
from deltawire.weights.digest import MODULUS, digest_at, digest_bits

CPU = torch.device("cpu")
KINDS = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def places(draw):
    """A rectangle of a checkpoint tensor, and a permutation of its dimensions in which a storage holds it."""
    whole = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    shape = tuple(draw(st.integers(1, length)) for length in whole)
    first = [draw(st.integers(0, length - part)) for length, part in zip(whole, shape, strict=True)]
    rows = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    order, strides, stride = draw(st.permutations(range(len(shape)))), [0] * len(shape), 1
    for dim in order:
        strides[dim] = stride
        stride *= shape[dim] + draw(st.integers(0, 1))
    offset = sum(at * row for at, row in zip(first, rows, strict=True))
    return LiveBox(shape, offset, tuple(rows), "w", draw(st.integers(0, 3)), tuple(strides))


def seen(box: LiveBox, storage: torch.Tensor, accelerators: Accelerators) -> Memory:
    return Memory(storage, 0, accelerators.of(storage.device))


@given(box=places(), kind=st.sampled_from(KINDS), arena=st.sampled_from([0, LEAST]), strips=st.sampled_from([1, 4096]))
def test_a_rectangle_has_the_same_digest_wherever_it_lies(box, kind, arena, strips):
    random = np.random.default_rng(box.size)
    storage = torch.from_numpy(random.integers(0, 256, 8 * 5000, np.uint8)).view(kind)
    numbers = np.arange(box.size)
    positions, offsets = box.at(numbers)
    on_host = Memory(storage)
    bits = on_host.gather(offsets)
    expected = digest_at(positions, bits)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accelerator, "ON_HOST", frozenset())
        patched.setattr(digests, "STRIPS", strips)
        held = seen(box, storage, Accelerators(arena))
        assert np.array_equal(held.lying(box), bits)
        assert np.array_equal(held.gather(offsets), bits)
        assert digests_of([Place(held, box)] * 3) == [expected] * 3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(digests, "CHUNK", 5)
        assert digests_of([Place(on_host, box)]) == [expected]


@given(box=places(), most=st.integers(1, 40))
def test_pieces_of_a_box_are_its_elements_in_row_major_order(box, most):
    pieces = list(box.pieces(most))
    assert max(piece.size for piece in pieces) <= most
    found = [np.concatenate(each) for each in zip(*(piece.at(np.arange(piece.size)) for piece in pieces), strict=True)]
    assert all(map(np.array_equal, found, box.at(np.arange(box.size))))


@given(box=places(), arena=st.sampled_from([0, LEAST]))
def test_bits_are_put_into_a_rectangle_and_nowhere_else(box, arena):
    storage = torch.zeros(5000, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(accelerator, "ON_HOST", frozenset())
        memory = seen(box, storage, Accelerators(arena))
        wanted, start = np.arange(1, box.size + 1, dtype=np.uint16), 0
        for piece in memory.pieces(box):
            memory.put(piece, memory.kept(wanted[start : start + piece.size]))
            start += piece.size
    expected = np.zeros(5000, np.uint16)
    expected[box.at(np.arange(box.size))[1]] = wanted
    assert np.array_equal(storage.view(torch.int16).numpy().view(np.uint16), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_is_of_a_tensors_elements_in_their_order(held_on, kind):
    random = np.random.default_rng(1)
    whole = torch.from_numpy(random.integers(0, 256, 8 * 600, np.uint8)).view(kind)[:600].reshape(20, 30)
    tensors = {"whole": whole, "turned": whole.t(), "half": whole[::2], "again": whole, "none": whole[:0]}
    found = fingerprints(tensors, Accelerators())
    unsigned = np.dtype(f"<u{kind.itemsize}")
    for name, tensor in tensors.items():
        bits = tensor.contiguous().view(torch.uint8).numpy().reshape(-1).view(unsigned)
        assert found[name] == digest_bits(bits) % MODULUS
    assert len({found[name] for name in tensors}) == 4
    assert all(found[one] != found[other] for one, other in itertools.combinations(["whole", "turned", "half"], 2))


def test_the_fingerprint_of_a_turned_tensor_takes_no_memory_but_the_window(on_accelerator, monkeypatch):
    turned, accelerators = torch.rand(64, 48, device=on_accelerator).t(), Accelerators(LEAST)
    accelerators.take_for([turned])
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # which would copy all of it
    found = fingerprints({"turned": turned}, accelerators)
    monkeypatch.undo()
    assert found == {"turned": digest_bits(to_host(turned))}


def test_all_tensors_of_an_accelerator_are_digested_in_one_sweep(on_accelerator, monkeypatch):
    sweeps, accelerators = [], Accelerators(LEAST)
    original = digests.sweeps.digest
    monkeypatch.setattr(digests.sweeps, "digest", lambda parts: sweeps.append(len(parts)) or original(parts))
    storages = [torch.full((30,), number, dtype=torch.bfloat16, device=on_accelerator) for number in range(5)]
    boxes = [LiveBox((5, 6), 0, (12, 1), "w", 0, (6, 1))] * 5
    digests_of([Place(seen(box, storage, accelerators), box) for box, storage in zip(boxes, storages, strict=True)])
    fingerprints(dict(zip("abcde", storages, strict=True)), accelerators)
    assert sweeps == [5, 5]
    monkeypatch.setattr(digests, "AT_ONCE", 65)  # two storages of 30 elements, and a part of the third
    assert fingerprints(dict(zip("abcde", storages, strict=True)), accelerators) == {
        name: digest_bits(to_host(storage)) for name, storage in zip("abcde", storages, strict=True)
    }
    assert sweeps == [5, 5, 2, 2, 1]
