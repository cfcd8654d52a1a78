"""The GPU benchmark measures what deltawire does: the same digest, the same bytes. It runs without one, too."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltawire.format.codecs import varints
from deltawire.format.codecs.base import zigzag
from deltawire.weights import kernels

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import gpu_apply

        yield gpu_apply


def test_its_digest_is_ours(benchmark, monkeypatch):
    bits = np.random.default_rng(0).integers(0, 1 << 16, 5000, np.uint16)
    monkeypatch.setattr(benchmark, "CHUNK", 512)
    assert benchmark.digest(torch.from_numpy(bits.view(np.int16))) == kernels.plain.digest_sweep(bits)


@given(gaps=st.lists(st.integers(0, 400) | st.integers(0, (1 << 21) - 1), min_size=1, max_size=50), data=st.data())
def test_its_gaps_and_steps_are_the_bytes_of_codec_gap_both_ways(benchmark, gaps, data):
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    coded = np.empty(11 * positions.size, np.uint8)
    coded = coded[: varints.write_gaps(positions, coded)]
    assert benchmark.encode_gaps(torch.from_numpy(positions)).numpy().tolist() == coded.tolist()
    assert benchmark.decode_gaps(torch.from_numpy(coded)).numpy().tolist() == positions.tolist()
    drawn = st.integers(-3, 3) | st.integers(-(1 << 15), (1 << 15) - 1)
    steps = np.array(data.draw(st.lists(drawn.filter(bool), min_size=len(gaps), max_size=len(gaps))), np.int16)
    packed = np.empty(3 * steps.size, np.uint8)
    packed = packed[: varints.write_varints(zigzag(steps.view(np.uint16)), packed)]
    assert benchmark.decode_steps(torch.from_numpy(packed)).numpy().tolist() == steps.tolist()


def test_it_runs_on_a_cpu_from_end_to_end():
    command = [sys.executable, str(FOLDER / "gpu_apply.py"), "--device", "cpu", "--elements", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its bound") == 9
    assert "digest of all" in done.stdout
