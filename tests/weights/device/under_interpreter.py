"""The Triton twin gives what the torch twin gives. `test_sweeps.py` runs this under TRITON_INTERPRET=1, and
tests/gpu/test_kernels_on_cuda.py on a GPU."""

import os

import numpy as np
import pytest
import torch
from cpu_devices import DevicePublisher
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fresh, read_weights
from strategies import changed, random_bits, seeds

from deltawire.errors import ConcurrentWrite
from deltawire.format.codecs import ranks, ranks_triton
from deltawire.weights.device import launches, sweeps, torch_twin, triton_twin
from deltawire.weights.device.carriers import CARRIERS, Part, Strip
from deltawire.weights.tensors import cast, equal

DEVICE = os.environ.get("DELTAWIRE_TEST_DEVICE", "cpu")
DTYPES = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}
KEPT = (("b", "BF16"), ("c", "F16"))
few = settings(max_examples=3)
widths = pytest.mark.parametrize("width", DTYPES)


@pytest.fixture(autouse=True)
def on_the_device():
    """Every tensor that a test makes is there."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """The interpreter takes a millisecond a block, so a few blocks are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_twin, "BLOCK", 64)
        patch.setattr(triton_twin, "FEW", 32)
        patch.setattr(ranks_triton, "BLOCK", 64)
        patch.setattr(ranks_triton, "FEW", 16)
        patch.setattr(ranks_triton, "AT_ONCE", 200)
        yield


def pair(seed: int, width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Carriers before and after a change: some are empty, some of one block, some of several."""
    rng = np.random.default_rng(seed)
    old = [random_bits(rng, DTYPES[width], (int(rng.choice([0, 1, 64, 65, 300])),)) for _ in range(4)]
    new = [changed(rng, bits, str(rng.choice(["nothing", "a few by one", "half", "everything"]))) for bits in old]
    kind = "u1" if width == 1 else f"i{width}"
    first, second = ([torch.from_numpy(bits.data.view(kind)).to(DEVICE) for bits in each] for each in (old, new))
    return first, second


def same(one, other):
    assert one.counts == other.counts
    for name in ("positions", "increments", "bits"):
        own, twin = getattr(one, name), getattr(other, name)
        assert own.dtype == twin.dtype
        assert torch.equal(own, twin), name


@widths
@given(seeds, st.integers(1, 40), st.integers(0, 60), st.integers(0, 2**40))
@few
def test_digest(width, seed, run, gap, offset):
    for strip in (Strip(), Strip(offset), Strip(offset, run, run + gap)):
        parts = [Part(flat, strip) for flat in pair(seed, width)[0]]
        assert triton_twin.digest(parts) == torch_twin.digest(parts)


@widths
@given(seeds)
@few
def test_compare_digest_at_gather_and_scatter(width, seed):
    base, new = pair(seed, width)
    found = torch_twin.compare(new, base)
    same(triton_twin.compare(new, base), found)
    for positions in (found.positions, found.positions.long() + 2**40):
        arguments = (found.counts, positions, found.bits)
        assert triton_twin.digest_at(*arguments) == torch_twin.digest_at(*arguments)
    for offsets in (found.positions, found.positions.long()):
        assert torch.equal(
            triton_twin.gather(new, found.counts, offsets), torch_twin.gather(new, found.counts, offsets)
        )
    triton_twin.scatter(base, found.counts, found.positions, found.bits)
    assert all(map(torch.equal, base, new))


@given(seeds)
@few
def test_fp32_is_rounded_to_bf16_beside_what_is_bf16(seed):
    rng = np.random.default_rng(seed)
    wide = torch.from_numpy(random_bits(rng, "F32", (300,)).data.view(np.float32)).to(DEVICE)
    base, new = pair(seed, 2)
    rounded = torch_twin.bf16_bits(wide)
    rounded[::7] += 1
    same(triton_twin.compare([*new, wide], [*base, rounded]), torch_twin.compare([*new, wide], [*base, rounded]))


def test_bf16_at_every_limit():
    words = np.arange(1 << 8, dtype=np.uint32) << 24
    lows = np.array([0, 0x8000, 0x18000, 0x17FFF, 0x7F8000, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFF], np.uint32)
    wide = torch.from_numpy((words[:, None] | lows).reshape(-1).view(np.float32)).to(DEVICE)
    zeros = torch.zeros(wide.numel(), dtype=torch.int16)
    same(triton_twin.compare([wide], [zeros]), torch_twin.compare([wide], [zeros]))


@pytest.mark.parametrize("more", [True, False])
def test_a_block_that_changes_between_the_passes_is_an_error_and_is_never_written_past(monkeypatch, more):
    """The next block's places, and memory behind the arrays, hold what they held."""
    base, new = torch.zeros(200, dtype=torch.int16), torch.zeros(200, dtype=torch.int16)
    new[::50] = 1
    whole, written = torch.empty, []

    def guarded(size, **how):
        made = whole(size + 64, **how).fill_(77)
        written.append((made, size))
        return made[:size]

    count = launches.Launch.per_tensor

    def meanwhile(launch, numbers):
        found = count(launch, numbers)
        new.fill_(1) if more else new.zero_()
        monkeypatch.setattr(torch, "empty", guarded)
        return found

    monkeypatch.setattr(launches.Launch, "per_tensor", meanwhile)
    with pytest.raises(ConcurrentWrite):
        triton_twin.compare([new], [base])
    monkeypatch.undo()
    assert written
    assert all(bool((made[size:] == 77).all()) for made, size in written)
    assert not base.any()


@pytest.mark.parametrize("kind", CARRIERS.values())
def test_an_offset_beyond_its_tensor_reads_nothing_and_writes_nothing(kind):
    memory = torch.arange(30, dtype=kind)
    flats, offsets = [memory[:10], memory[10:20]], torch.tensor([3, 10, -1, 25], dtype=torch.int32)
    assert triton_twin.gather(flats, [2, 2], offsets).tolist() == [3, 0, 0, 0]
    triton_twin.scatter(flats, [2, 2], offsets, torch.full((4,), 99, dtype=kind))
    assert [at for at, value in enumerate(memory.tolist()) if value == 99] == [3]


def test_a_run_is_published_from_a_device_by_these_kernels(monkeypatch):
    monkeypatch.setattr(sweeps, "_twin", lambda tensor: triton_twin)
    bucket = fresh()
    weights = {"a": torch.randn(30, 8), "b": torch.randn(17).bfloat16(), "c": torch.randn(9, 5).t().half()}
    with DevicePublisher(bucket, baseline="device", dtype={"c": "F16", "a": "BF16"}, codec="class") as publisher:
        for _ in range(3):
            for tensor in weights.values():
                tensor.mul_(1 + 0.1 * (torch.rand_like(tensor) < 0.3))
            report = publisher.publish(weights)
            publisher.flush(timeout=60)
    assert (report.baseline, report.codec) == ("device", "class")
    assert 0 < report.changed < report.total
    assert equal(read_weights(bucket), {"a": cast(weights["a"], "BF16"), **{n: cast(weights[n], k) for n, k in KEPT}})


def test_nothing_is_launched_for_nothing():
    empty, none = torch.zeros(0, dtype=torch.int16), torch.zeros(0, dtype=torch.int32)
    assert triton_twin.digest([Part(empty), Part(empty)]) == [0, 0]
    assert triton_twin.digest_at([0], none, empty) == [0]
    assert triton_twin.compare([empty], [empty]).counts == (0,)


@widths
@given(seeds)
@few
def test_a_scatter_made_ready_writes_when_it_is_called_and_not_before(width, seed):
    base, new = pair(seed, width)
    found, before = torch_twin.compare(new, base), [flat.clone() for flat in base]
    put = triton_twin.scattering(base, found.counts, found.positions.dtype)
    assert all(map(torch.equal, base, before))
    for bits, expected in ((found.bits, new), (found.bits - found.increments, before)):
        put(found.positions, bits)
        assert all(map(torch.equal, base, expected))


CLASSED = {1: "F8_E5M2", 2: "BF16", 4: "F32", 8: "F64"}


def to_rank(seed: int, width: int) -> tuple[list[ranks.ToRank], torch.Tensor]:
    """Tensors in tiles of rows, of columns, and whole, of which some rows change; and where."""
    rng, asked, positions = np.random.default_rng(seed), [], []
    for number, (shape, tile) in enumerate(
        [((40, 16), (8, 16)), ((12, 20), (12, 8)), ((130,), (1, 130)), ((), (1, 1))]
    ):
        bits = random_bits(rng, CLASSED[width], shape)
        old = torch.from_numpy(bits.data.view("u1" if width == 1 else f"i{width}")).to(DEVICE)
        changes = rng.random(bits.data.size) < rng.choice([0.05, 0.6])
        changes[: changes.size // 2] &= len(shape) != 2  # half of the rows are idle
        changes[-1] = True
        positions.append(np.flatnonzero(changes))
        asked.append(ranks.ToRank(str(number), bits.dtype, shape, old, tile, positions[-1].size))
    return asked, torch.from_numpy(np.concatenate(positions)).to(DEVICE)


@pytest.mark.parametrize("width", CLASSED)
@given(seeds)
@few
def test_ranks(width, seed):
    asked, positions = to_rank(seed, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "may_be_few", lambda rows, live, changed: live < rows)
        patch.setattr(sweeps, "_twin", lambda tensor: triton_twin)
        found = ranks.rank(asked, positions)
        patch.setattr(sweeps, "_twin", lambda tensor: torch_twin)
        expected = ranks.rank(asked, positions)
    assert found.live.tiles
    assert all(map(torch.equal, found.arrays(), expected.arrays()))
