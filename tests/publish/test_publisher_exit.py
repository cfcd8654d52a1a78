"""A trainer that ends without closing its publisher: what was captured still gets there, or an error says that it did
not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltawire import Subscriber, open_bucket
from deltawire.hub_server import HubProcess

PUBLISHES = """
import os, sys
from deltawire import Publisher, open_bucket
from deltawire.publish import publisher
from deltawire.buckets.faulty import Faulty, at
from runs import edit, model
bucket, weights = open_bucket(sys.argv[1], create=True), model()
opened = Publisher({bucket})
for step in range(4):
    opened.publish(weights, step=step)
    edit(weights, step)
"""
SLOW = "Faulty(bucket, at('put_new', '', 'delay', times=100, seconds=0.3))"
DOWN = "Faulty(bucket, at('put_new', 'deltas/', 'fail before', times=10**9))"


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


def run(url: str, *, bucket: str, then: str) -> subprocess.CompletedProcess[str]:
    """A process that publishes four steps, does `then`, and ends."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", PUBLISHES.format(bucket=bucket) + then, url],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def steps(url: str) -> list[int | None]:
    with Subscriber(open_bucket(url)) as subscriber:
        return [commit.step for commit in subscriber.commits()]


@pytest.mark.parametrize("address", ["url", "hub_url"])
def test_what_was_captured_is_in_the_bucket_when_the_process_has_ended(
    address: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(address)
    done = run(url, bucket=SLOW, then="")
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(url)[-1] == 3


def test_a_training_loop_that_raised_loses_nothing_either(url: str) -> None:
    done = run(url, bucket=SLOW, then="raise KeyError('reward')")
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'reward'\n")
    assert steps(url)[-1] == 3


def test_a_store_that_stays_down_holds_the_process_only_so_long_and_an_error_says_what_is_lost(url: str) -> None:
    done = run(url, bucket=DOWN, then="publisher.AT_EXIT = 1.0")
    assert "the process ends with changes not in the bucket (close() would have waited" in done.stderr
    assert "not all committed after 1.0 s" in done.stderr
    assert steps(url) == [0]


def test_a_forked_child_that_ends_neither_waits_nor_sends(url: str) -> None:
    done = run(
        url,
        bucket=SLOW,
        then="""
child = os.fork()
if child == 0:
    opened.close = lambda *arguments: os._exit(7)
    sys.exit(0)
assert os.waitpid(child, 0) == (child, 0)
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert steps(url)[-1] == 3


FORKS = """
opened.flush(30)
child = os.fork()
if child == 0:
    try:
        with opened:
            opened.publish(weights, step=9)
    except Exception as error:
        print("child:", error, flush=True)
    opened.close()
    sys.exit()
os.waitpid(child, 0)
opened.publish(weights, step=10)
opened.close()
"""


def test_a_forked_child_publishes_nothing_and_leaves_the_parents_files_alone(url: str) -> None:
    done = run(url, bucket="bucket", then=FORKS)
    assert done.returncode == 0, done.stderr
    assert "a forked child cannot use it" in done.stdout
    assert steps(url)[-1] == 10
    assert 9 not in steps(url)


FORKS_A_READER = """
from deltawire import Subscriber
opened.close()
with Subscriber(bucket) as subscriber:
    update = next(subscriber.updates())
    child = os.fork()
    if child == 0:
        subscriber.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert subscriber.anchor_files(0)[0].is_file()
    assert next(subscriber.updates()).anchor["norm"].data.size == 8
"""


def test_a_forked_child_of_a_reader_leaves_its_downloads_alone(url: str) -> None:
    done = run(url, bucket="bucket", then=FORKS_A_READER)
    assert done.returncode == 0, done.stderr
