"""A sweep over many tensors of a device gives what the loops of this host give, tensor by tensor."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import changed, random_bits, seeds, versions

from deltawire.errors import ConcurrentWrite, ShapeMismatch
from deltawire.weights import kernels_numpy as plain
from deltawire.weights.bits import Bits
from deltawire.weights.boxes import Box
from deltawire.weights.device import sweeps, torch_twin
from deltawire.weights.device.carriers import CARRIERS, Part, Strip, positions_for
from deltawire.weights.tensors import cast

DTYPES = ["U8", "BF16", "F32", "F64"]
HERE = Path(__file__).parent
DEVICE = os.environ.get("DELTAWIRE_TEST_DEVICE", "cpu")
"""where what is compared with the host's loops lies: on a GPU in tests/gpu/test_kernels_on_cuda.py"""


def carrier(bits: Bits) -> torch.Tensor:
    signed = bits.data.view(f"{'u' if bits.data.itemsize == 1 else 'i'}{bits.data.itemsize}")
    return torch.from_numpy(signed).to(DEVICE)


def unsigned(flat: torch.Tensor) -> np.ndarray:
    return flat.cpu().numpy().view(f"u{flat.element_size()}")


def tensors(seed: int, dtype: str, count: int = 5) -> tuple[list[Bits], list[Bits]]:
    """Tensors before and after a change, some of them empty or without a change."""
    rng = np.random.default_rng(seed)
    old = [random_bits(rng, dtype, (int(rng.choice([0, 1, 5, 64, 3000])),)) for _ in range(count)]
    return old, [changed(rng, bits, str(rng.choice(["nothing", "a few by one", "half", "anything"]))) for bits in old]


@given(versions(1))
def test_the_digests_of_tensors_of_any_widths_are_those_of_the_host(chain):
    weights = chain[0].values()
    expected = [plain.digest_sweep(bits.data) for bits in weights]
    assert sweeps.digest([Part(carrier(bits)) for bits in weights]) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@given(seeds, st.integers(0, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 6))
def test_the_digest_of_a_strip_is_that_of_its_box(dtype, seed, top, rows, left, columns):
    whole = (top + rows + 1, left + columns + 2)
    box = Box.within(whole, (top, left), (rows, columns))
    data = random_bits(np.random.default_rng(seed), dtype, (rows, columns))
    strip = Strip(box.offset, run=columns, stride=whole[1])
    assert sweeps.digest([Part(carrier(data), strip)]) == [box.digest(data.data)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(seeds)
def test_compare_finds_what_the_host_finds_and_scatter_takes_it_to_the_baseline(dtype, seed):
    old, new = tensors(seed, dtype)
    base = [carrier(bits.copy()) for bits in old]
    found = sweeps.compare([carrier(bits) for bits in new], base)
    expected = [plain.compare_and_collect(was.data, own.data) for was, own in zip(old, new, strict=True)]
    assert found.counts == tuple(positions.size for positions, _ in expected)
    assert np.array_equal(found.positions.cpu().numpy(), np.concatenate([positions for positions, _ in expected]))
    assert np.array_equal(unsigned(found.increments), np.concatenate([steps for _, steps in expected]))

    before = sweeps.digest_at(found.counts, found.positions, found.bits - found.increments)
    after = sweeps.digest_at(found.counts, found.positions, found.bits)
    copies = [bits.data.copy() for bits in old]
    assert [*zip(before, after, strict=True)] == [
        plain.apply_with_digest(data, *change) for data, change in zip(copies, expected, strict=True)
    ]
    assert torch.equal(sweeps.gather(base, found.counts, found.positions), found.bits - found.increments)
    sweeps.scatter(base, found.counts, found.positions, found.bits)
    assert [unsigned(flat).tolist() for flat in base] == [bits.data.tolist() for bits in new]


@given(seeds)
def test_fp32_is_compared_as_the_bf16_that_the_host_rounds_it_to(seed):
    rng = np.random.default_rng(seed)
    masters = [random_bits(rng, "F32", (size,)) for size in (0, 7, 2500)]
    kept = random_bits(rng, "BF16", (40,))
    rounded = [cast(bits, "BF16") for bits in masters]
    old = [changed(rng, bits, "a few by one") for bits in (*rounded, kept)]
    new = [carrier(bits).view(torch.float32) for bits in masters]
    found = sweeps.compare([*new, carrier(kept)], [carrier(bits) for bits in old])
    expected = [plain.compare_and_collect(was.data, own.data) for was, own in zip(old, (*rounded, kept), strict=True)]
    assert found.counts == tuple(positions.size for positions, _ in expected)
    assert np.array_equal(found.positions.cpu().numpy(), np.concatenate([positions for positions, _ in expected]))
    assert np.array_equal(unsigned(found.increments), np.concatenate([steps for _, steps in expected]))


def test_bf16_is_rounded_as_the_host_rounds_at_every_limit():
    words = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        wide = (words | low).view(np.float32)
        rounded = torch_twin.bf16_bits(torch.from_numpy(wide).to(DEVICE))
        assert np.array_equal(unsigned(rounded), cast(wide, "BF16").data)


def test_what_needs_more_than_a_chunk_is_the_same(monkeypatch):
    rng = np.random.default_rng(5)
    old = random_bits(rng, "BF16", (1000,))
    new = changed(rng, old, "half")
    whole = sweeps.compare([carrier(new)], [carrier(old)])
    digests = sweeps.digest([Part(carrier(new), Strip(3, 10, 17))])
    monkeypatch.setattr(torch_twin, "CHUNK", 64)
    again = sweeps.compare([carrier(new)], [carrier(old)])
    assert whole.counts == again.counts != (0,)
    assert torch.equal(whole.positions, again.positions)
    assert torch.equal(whole.bits, again.bits)
    assert sweeps.digest([Part(carrier(new), Strip(3, 10, 17))]) == digests
    there = carrier(old)
    assert torch.equal(sweeps.gather([carrier(new)], whole.counts, whole.positions), whole.bits)
    sweeps.scatter([there], whole.counts, whole.positions, whole.bits)
    assert torch.equal(there, carrier(new))


def test_an_element_that_is_written_between_two_looks_is_an_error_and_moves_nothing(monkeypatch):
    old, new = torch.zeros(10, dtype=torch.int16), torch.ones(10, dtype=torch.int16)
    look = torch.nonzero

    def written(mask):
        found = look(mask)
        new.zero_()
        return found

    monkeypatch.setattr(torch, "nonzero", written)
    with pytest.raises(ConcurrentWrite):
        sweeps.compare([new], [old])
    assert not old.any()


def test_positions_take_eight_bytes_only_where_a_tensor_needs_them():
    assert positions_for([1 << 31, 5]) == torch.int32
    assert positions_for([5, (1 << 31) + 1]) == torch.int64


FLAT = torch.zeros(4, dtype=torch.int16)
LISTED = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sweeps.digest([Part(torch.zeros(2, 2, dtype=torch.int16))]),
        lambda: sweeps.digest([Part(torch.zeros(4))]),
        lambda: sweeps.digest_at([3], LISTED, FLAT[:2]),
        lambda: sweeps.digest_at([3, -1], LISTED, FLAT[:2]),
        lambda: sweeps.compare([FLAT], [FLAT, FLAT]),
        lambda: sweeps.compare([FLAT[:3]], [FLAT]),
        lambda: sweeps.compare([FLAT.int()], [FLAT]),
        lambda: sweeps.compare([FLAT.float()], [FLAT.int()]),
        lambda: sweeps.compare([], []),
        lambda: sweeps.compare([torch.zeros(8, dtype=torch.int16)[::2]], [FLAT]),
        lambda: sweeps.gather([FLAT], [3], LISTED),
        lambda: sweeps.gather([FLAT, FLAT.int()], [1, 1], LISTED),
        lambda: sweeps.scatter([FLAT], [2], LISTED, FLAT),
        lambda: sweeps.scatter([FLAT], [2], LISTED, FLAT[:2].int()),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ShapeMismatch):
        call()
    assert not FLAT.any()


@given(st.sampled_from(list(CARRIERS.values())))
@settings(max_examples=4)
def test_nothing_to_do_is_nothing(kind):
    empty, none = torch.zeros(0, dtype=kind), torch.zeros(0, dtype=torch.int32)
    assert sweeps.digest([]) == []
    assert sweeps.digest([Part(empty), Part(empty)]) == [0, 0]
    assert sweeps.digest_at([0, 0], none, empty) == [0, 0]
    assert sweeps.compare([empty, empty], [empty, empty]).counts == (0, 0)
    assert sweeps.gather([empty], [0], none).dtype == kind


def test_under_tritons_interpreter_every_sweep_gives_what_plain_torch_gives():
    """A process of its own, because Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "under_interpreter.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_a_host_that_cannot_compile_kernels_sweeps_in_plain_torch_and_says_so_once(monkeypatch, caplog):
    def without_a_compiler(*arguments):
        raise RuntimeError("Failed to find C compiler")

    sweeps._compiles.cache_clear()
    monkeypatch.setattr(sweeps, "_triton_twin", lambda: SimpleNamespace(gather=without_a_compiler))
    on_cuda = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    assert [sweeps._twin(on_cuda) for _ in range(2)] == [torch_twin] * 2
    assert [record.message for record in caplog.records] == [
        "cpu: Triton's kernels do not run (Failed to find C compiler), so plain torch does their work, more slowly"
    ]

    def without_memory(*arguments):
        raise torch.OutOfMemoryError

    sweeps._compiles.cache_clear()
    works = SimpleNamespace(gather=without_memory)
    monkeypatch.setattr(sweeps, "_triton_twin", lambda: works)
    with pytest.raises(torch.OutOfMemoryError):
        sweeps._twin(on_cuda)
    works.gather = lambda *arguments: None
    assert sweeps._twin(on_cuda) is works
    sweeps._compiles.cache_clear()
