"""A baseline in a file: the same bits as in memory, nothing left behind, and a full disk that says so."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from runs import edit, fresh, model, publishing, read_weights, served, table
from waiting import PATIENCE

import deltawire as dw
from deltawire.errors import OutOfSpace
from deltawire.format import checkpoint
from deltawire.publish import scratch
from deltawire.publish.scratch import ScratchFiles
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import equal


def bits(size, *, first=0):
    return Bits("BF16", (size,), np.arange(first, first + size, dtype=np.uint16))


def test_copies_hold_what_they_were_made_of_wherever_a_segment_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "SEGMENT", 8192)
    scratch_files, sizes = ScratchFiles(tmp_path), (1, 31, 0, 3000, 2000, 20_000, 7)
    given = [bits(size, first=number) for number, size in enumerate(sizes)]
    held = [scratch_files.copy(one) for one in given]
    assert held == given
    held[3].data[:] = 5
    assert [one == other for one, other in zip(held, given, strict=True)] == [n != 3 for n in range(len(sizes))]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    scratch_files = ScratchFiles(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfSpace, match="TMPDIR"):
        scratch_files.copy(bits(8))
    monkeypatch.undo()
    assert scratch_files.copy(bits(8)) == bits(8)


@pytest.mark.parametrize("based", [False, True])
def test_a_run_is_published_and_continued_from_a_baseline_in_a_file(tmp_path, monkeypatch, based):
    temporary, base = tmp_path / "temporary", None
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    weights, bucket = model(), fresh()
    if based:
        base = tmp_path / "base"
        base.mkdir()
        checkpoint.write(base, table(served(weights)), served(weights))
    for seed in range(2):
        with publishing(bucket, baseline="file", base=base) as publisher:
            edit(weights, seed)
            publisher.publish(weights)
            edit(weights, seed + 2)
            assert publisher.publish(weights).changed > 0
            publisher.flush(PATIENCE)
            assert any(str(temporary) in mapped and "(deleted)" in mapped for mapped in open_files())
    assert equal(read_weights(bucket, base=base), served(weights))
    assert list(temporary.iterdir()) == []


def open_files():
    return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_another_place_is_refused():
    with pytest.raises(ValueError, match="baseline='disk'"):
        dw.Publisher(fresh(), baseline="disk")
