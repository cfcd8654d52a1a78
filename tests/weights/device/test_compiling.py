"""The kernels compile for a GPU that is not here, down to its machine code."""

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltawire.format.codecs import ranks_triton
from deltawire.weights.device import launches, triton_twin

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = {"tensors": "*i64", "table": "*i64", "n": "i32"}
POINTERS = {1: "*u8", 2: "*i16", 4: "*i32", 8: "*i64"}
KINDS = dict(zip(POINTERS, launches.KINDS.values(), strict=True))


OTHERS = [(1, False, "*i32"), (4, False, "*i32"), (8, False, "*i64")]
"""width of the elements, whether some are rounded, and positions"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, *constants, block, **arguments):
    """The kernel's assembly."""
    values = {**dict(constants), "BLOCK": block}
    signature = {**NUMBERS, **arguments, **dict.fromkeys(values, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=HOPPER, options={"enable_fp_fusion": False}).asm


@pytest.mark.parametrize(
    ("width", "rounds", "positions"),
    [(2, True, "*i32"), *(pytest.param(*how, marks=pytest.mark.nightly) for how in OTHERS)],
)
def test_compare(width, rounds, positions):
    how = (("KIND", KINDS[width]), ("ROUND", rounds))
    found = {"positions": positions, "increments": POINTERS[width], "bits": POINTERS[width], "found": "*i64"}
    count = compiled(triton_twin._count, *how, block=triton_twin.BLOCK, counts="*i64")
    emit = compiled(triton_twin._emit, *how, block=triton_twin.BLOCK, counts="*i64", ends="*i64", **found)
    assert count["cubin"]
    assert emit["cubin"]


@pytest.mark.parametrize("width", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_digest_gather_and_scatter(width):
    kind, flat = ("KIND", KINDS[width]), POINTERS[width]
    assert compiled(triton_twin._digest, kind, block=triton_twin.BLOCK, sums="*i64")["cubin"]
    listed = {"positions": "*i32", "bits": flat, "sums": "*i64"}
    assert compiled(triton_twin._digest_at, kind, block=triton_twin.FEW, **listed)["cubin"]
    for kernel in (triton_twin._gather, triton_twin._scatter):
        assert compiled(kernel, block=triton_twin.FEW, offsets="*i32", bits=flat)["cubin"]


@pytest.mark.parametrize(
    ("width", "live"), [(2, True), *(pytest.param(*how, marks=pytest.mark.nightly) for how in ((1, False), (8, True)))]
)
def test_ranks(width, live):
    how, block = (("KIND", KINDS[width]), ("LIVE", live)), ranks_triton.BLOCK
    assert compiled(ranks_triton._count_classes, *how, block=block, is_live="*u8", counted="*i32")["cubin"]
    found = {"before": "*i32", "bounds": "*i64", "inside": "*i64", "found": "*u8", "ranks": "*i32"}
    few = ("FEW", ranks_triton.FEW)
    assert compiled(ranks_triton._rank, *how, few, block=block, is_live="*u8", **found)["cubin"]
