"""The core without Numba and cryptography: the same bytes and digests, and one warning where it is slow."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltawire.weights import kernels_numpy as plain
from deltawire.weights import speed

PROGRAM = Path(__file__).parents[1] / "support" / "core_paths.py"


def run(folder: Path, *blocked: str) -> dict:
    folder.mkdir()
    command = [sys.executable, "-W", "error", PROGRAM, folder, *blocked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_published_followed_and_verified_without_numba_has_the_same_bytes(tmp_path):
    with_numba = run(tmp_path / "with")
    without = run(tmp_path / "without", "numba", "llvmlite", "cryptography", "zstandard")
    assert (with_numba.pop("loaded"), without.pop("loaded")) == (["numba"], [])
    assert without == with_numba
    assert len(without["deltas"]) == 4
    assert without["followed"]
    assert without["verified"] == without["materialized"] == 4


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setattr(speed, "why_no_numba", lambda: "No module named 'numba'")
    monkeypatch.setattr(speed, "_elements", 0)
    monkeypatch.setattr(speed, "NOTICEABLE", 1000)


def test_a_large_job_without_numba_says_once_what_to_install(no_numba):
    plain.digest_sweep(np.zeros(999, np.uint8))
    with pytest.warns(RuntimeWarning, match=r"No module named 'numba'.*pip install 'deltawire\[fast\]'") as said:
        for _ in range(3):
            plain.digest_sweep(np.zeros(999, np.uint8))
    assert len(said) == 1


def test_a_numba_that_cannot_be_imported_is_as_good_as_none(tmp_path, monkeypatch):
    refusing = tmp_path / "refusing"
    refusing.mkdir()
    (refusing / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.9.')")
    monkeypatch.setenv("PYTHONPATH", str(refusing), prepend=os.pathsep)
    assert run(tmp_path / "run")["loaded"] == []


def test_where_numba_is_installed_nothing_is_counted_or_said(monkeypatch):
    monkeypatch.setattr(speed, "NOTICEABLE", 10)
    plain.digest_sweep(np.zeros(999, np.uint8))
    assert speed._elements == 0


def test_only_modules_named_for_it_import_numba_so_that_each_has_a_twin_that_does_not():
    source = Path(speed.__file__).parents[1]
    named = {path for path in source.rglob("*.py") if path.stem.endswith("_numba")}
    imports = re.compile(r"^\s*(import|from) (numba|llvmlite)\b", re.M)
    importing = {path for path in source.rglob("*.py") if imports.search(path.read_text())} - {Path(speed.__file__)}
    assert importing <= named
    assert len(importing) >= 2
