"""Temporary folders: what a killed process left goes, what a living one uses stays."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from deltawire.buckets import temporary
from deltawire.buckets.temporary import TemporaryFolder, sweep
from deltawire.errors import AccessRefused, NotFound

HOLDING = """
import sys, time
from deltawire.buckets.temporary import TemporaryFolder
folder = TemporaryFolder()
(folder.path / "large").write_bytes(bytes(1 << 20))
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_removed_with_what_it_holds(parent):
    with TemporaryFolder() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"1")
        assert folder.parent == parent
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_uses_stays(parent):
    environment = os.environ | {"TMPDIR": str(parent)}
    command = [sys.executable, "-c", HOLDING]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, living = (child.stdout.readline().strip() for child in children)
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()
        (parent / "deltawire-of-another-make").mkdir()
        temporary._sweep_once.cache_clear()
        with TemporaryFolder() as folder:
            assert {str(path) for path in parent.iterdir()} == {
                living, str(folder), str(parent / "deltawire-of-another-make")
            }  # fmt: skip
            assert sweep(parent) == []
        assert not os.path.exists(killed)
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()


def test_one_that_another_process_removes_meanwhile_stops_nobody(parent, monkeypatch):
    (parent / "deltawire-gone").mkdir()
    listed = os.scandir

    def then_removed(folder):
        for entry in listed(folder):
            os.rmdir(entry.path)
            yield entry

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", then_removed)
        assert sweep(parent) == []


def left_behind(parent):
    """A folder whose process was killed: nobody holds its lock."""
    folder = TemporaryFolder()
    os.close(folder._lock)
    return folder.path


def test_a_folder_of_another_host_stays_and_one_of_another_container_of_this_host_goes(parent, monkeypatch):
    def left_by(*host):
        monkeypatch.setattr(temporary, "_host", lambda: host)
        return left_behind(parent)

    beside, earlier = left_by("another-container", "boot"), left_by("name", "the-boot-before")
    elsewhere = left_by("elsewhere", "another-boot")
    monkeypatch.setattr(temporary, "_host", lambda: ("name", "boot"))
    assert set(sweep(parent)) == {beside, earlier}
    assert elsewhere.is_dir()


def test_without_locks_or_a_list_of_what_is_there_a_folder_is_made_and_removed(parent, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def hidden(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    temporary._sweep_once.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused)
        patch.setattr(temporary, "_ours", hidden)
        folder = TemporaryFolder()
    (folder.path / "file").write_bytes(b"1")
    assert sweep(parent) == [], "nobody knows whether it is in use"
    folder.close()
    assert list(parent.iterdir()) == []


def test_a_folder_that_is_not_there_is_named_with_the_way_out(parent, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(parent / "nowhere"))
    with pytest.raises((NotFound, AccessRefused), match="TMPDIR chooses another"):
        TemporaryFolder()
