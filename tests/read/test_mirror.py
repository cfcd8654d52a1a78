"""The mirror: every position it claims is the one it holds, whatever killed it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mirrors import RUN, at, versions
from programs import program
from runs import table

from deltawire import Delta, digest
from deltawire.errors import AccessRefused, AlreadyExists, BadDigest, NotFound, OutOfSpace
from deltawire.format import checkpoint
from deltawire.read import mirror
from deltawire.read.mirror import Mirror, held, reading
from deltawire.weights.tensors import equal

STEPS = ["journal", "apply", "sync", "mark", "clean"]


def made(folder, weights):
    files = folder.parent / "files"
    files.mkdir()
    checkpoint.write(files, table(weights), weights)
    return Mirror.create(folder, files.iterdir(), at(weights, 0), table(weights))


def test_a_mirror_moves_forward_and_back_and_says_where_it_is(tmp_path):
    chain = versions(4)
    with made(tmp_path / "m", chain[0]) as copy:
        for version in (1, 2, 3, 1):
            copy.apply(Delta.between(dict(copy.weights), chain[version]), at(chain[version], version))
            assert equal(dict(copy.weights), chain[version])
            assert held(tmp_path / "m") == copy.position == at(chain[version], version)
            assert copy.digests == digest(chain[version])
    with Mirror(tmp_path / "m", table(chain[0])) as again:
        assert again.position == at(chain[1], 1)
    assert sorted(path.name for path in checkpoint.files(tmp_path / "m")) == ["deltawire.json", "model.safetensors"]


def test_a_change_that_does_not_lead_there_is_refused_before_anything_is_written(tmp_path):
    chain = versions(3)
    with made(tmp_path / "m", chain[0]) as copy:
        before = (tmp_path / "m" / "model.safetensors").read_bytes()
        with pytest.raises(BadDigest, match="nothing was written"):
            copy.apply(Delta.between(chain[0], chain[1]), at(chain[2], 2))
        assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
        assert copy.position.version == 0


def test_files_that_are_not_the_position_make_no_mirror(tmp_path):
    chain = versions(2)
    checkpoint.write(tmp_path, table(chain[0]), chain[0])
    with pytest.raises(BadDigest):
        Mirror.create(tmp_path / "m", [tmp_path / "model.safetensors"], at(chain[1], 1), table(chain[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_folder_in_use_or_of_something_else_is_refused(tmp_path):
    chain = versions(1)
    with made(tmp_path / "m", chain[0]), pytest.raises(AccessRefused, match="another process"):
        Mirror(tmp_path / "m", table(chain[0]))
    with pytest.raises(AlreadyExists):
        Mirror.create(tmp_path / "m", [], at(chain[0], 0), table(chain[0]))
    (tmp_path / "other").mkdir()
    with pytest.raises(NotFound, match="no mirror"):
        Mirror(tmp_path / "other", table(chain[0]))


def test_weights_that_drifted_are_found_at_opening(tmp_path):
    chain = versions(1)
    made(tmp_path / "m", chain[0]).close()
    path = tmp_path / "m" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadDigest, match="remove it"):
        Mirror(tmp_path / "m", table(chain[0]))


def test_a_reader_sees_a_whole_version_and_the_writer_waits(tmp_path):
    chain = versions(2)
    with made(tmp_path / "m", chain[0]) as copy, reading(tmp_path / "m") as (weights, position):
        assert position == copy.position
        assert equal({name: weights[name] for name in chain[0]}, chain[0])
        code = (
            f"import fcntl; f = open({str(tmp_path / 'm' / '.deltawire-readers')!r}, 'ab')\n"
            "try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: print('waits')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "waits\n"


def test_a_full_disk_leaves_the_old_version(tmp_path, monkeypatch):
    chain = versions(2)

    def full(path, data):
        raise OSError(28, "No space left on device")

    with made(tmp_path / "m", chain[0]) as copy:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(OutOfSpace):
                copy.apply(Delta.between(chain[0], chain[1]), at(chain[1], 1))
        assert equal(dict(copy.weights), chain[0])
        copy.apply(Delta.between(chain[0], chain[1]), at(chain[1], 1))
    assert not list((tmp_path / "m").glob(".*.part"))


@pytest.mark.parametrize("when", [*STEPS, "0", "1", "3"])
def test_killed_at_any_step_it_holds_the_old_version_or_the_new_one(tmp_path, when):
    chain = versions(3)
    made(tmp_path / "m", chain[0]).close()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, program("mirror_killed"), tmp_path / "m", when]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    if when in ("journal", "apply", "0", "1", "3"):
        with pytest.raises(NotFound, match="half written"), reading(tmp_path / "m"):
            pass
    with Mirror(tmp_path / "m", table(chain[0])) as copy:  # the journal was whole: it is done again
        assert copy.position == at(chain[1], 1)
        assert equal({name: copy.weights[name] for name in chain[1]}, chain[1])
        copy.apply(Delta.between(dict(copy.weights), chain[2]), at(chain[2], 2))
    assert not list((tmp_path / "m").glob(".deltawire-journal-*"))


def test_a_torn_journal_was_never_begun(tmp_path):
    chain = versions(2)
    made(tmp_path / "m", chain[0]).close()
    to = at(chain[1], 1)
    (tmp_path / "m" / f".deltawire-journal-{RUN}-1-{to.root}").write_bytes(b"half a file")
    with Mirror(tmp_path / "m", table(chain[0])) as copy:
        assert copy.position.version == 0
    assert not list((tmp_path / "m").glob(".deltawire-journal-*"))


def test_what_a_killed_copy_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".m-abcdefgh").mkdir()
    made(tmp_path / "m", versions(1)[0]).close()
    assert not (tmp_path / ".m-abcdefgh").exists()
    assert mirror.held(tmp_path / "m").version == 0
