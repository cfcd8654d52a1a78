"""A trainer that ends without closing its publisher: what was captured still gets there, or an error says that it did
not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import program

from deltawire import Subscriber, open_bucket
from deltawire.hub_server import HubProcess

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "bucket").as_uri()


@pytest.fixture
def hub_url(tmp_path: Path) -> Iterator[str]:
    with HubProcess(tmp_path / "root", log=tmp_path / "log") as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", "hf_fake")
        patch.setenv("HF_HOME", str(tmp_path / "home"))
        patch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
        yield "hf://buckets/me/left"


def run(scenario: str, url: str) -> subprocess.CompletedProcess[str]:
    """A process that publishes four steps, does what its scenario of `leaving.py` says, and ends."""
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, program("leaving"), scenario, url]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def steps(url: str) -> list[int | None]:
    with Subscriber(open_bucket(url)) as subscriber:
        return [commit.step for commit in subscriber.commits()]


@pytest.mark.parametrize("address", ["url", "hub_url"])
def test_what_was_captured_is_in_the_bucket_when_the_process_has_ended(
    address: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(address)
    done = run("ends", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(url)[-1] == 3


def test_a_training_loop_that_raised_loses_nothing_either(url: str) -> None:
    done = run("raises", url)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'reward'\n")
    assert steps(url)[-1] == 3


def test_a_store_that_stays_down_holds_the_process_only_so_long_and_an_error_says_what_is_lost(url: str) -> None:
    done = run("stays_down", url)
    assert "the process ends with changes not in the bucket (close() would have waited" in done.stderr
    assert "not all committed after 1.0 s" in done.stderr
    assert steps(url) == [0]


def test_a_forked_child_that_ends_neither_waits_nor_sends(url: str) -> None:
    done = run("forks", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(url)[-1] == 3


def test_a_forked_child_publishes_nothing_and_leaves_the_parents_files_alone(url: str) -> None:
    done = run("publishes_in_a_child", url)
    assert done.returncode == 0, done.stderr
    assert "a forked child cannot use it" in done.stdout
    assert steps(url)[-1] == 10
    assert 9 not in steps(url)


def test_a_forked_child_of_a_reader_leaves_its_downloads_alone(url: str) -> None:
    done = run("closes_a_reader_in_a_child", url)
    assert done.returncode == 0, done.stderr
