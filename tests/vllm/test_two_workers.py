"""Two real workers: whatever fails in one, both stay in step, both stay at one version, and the next update works."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from servers import START_SECONDS, Server
from test_models import TP2, TWO, Chain, assert_served, every, walk
from waiting import PATIENCE, until

from deltawire.errors import AnotherFollower, EngineError
from deltawire.follow.follower import Follower
from deltawire.vllm.client import EngineClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]
PLUGIN = Path(__file__).parents[1] / "support" / "faults_plugin"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A chain, a server of two workers over it, and the file that makes one of them fail."""
    folder = tmp_path_factory.mktemp("two")
    chain, fault = Chain(folder, "qwen3-one-kv-head"), folder / "fault"
    path = os.pathsep.join(filter(None, [str(PLUGIN), os.environ.get("PYTHONPATH")]))
    (folder / "journal").mkdir()
    told = {"DELTAWIRE_TEST_FAULT": str(fault), "DELTAWIRE_TEST_JOURNAL": str(folder / "journal")}
    environ = {**TWO, "PYTHONPATH": path, **told}
    server = Server(chain.checkpoint, folder / "vllm.log", options=TP2, **environ)
    try:
        yield chain, server.wait(), fault
    finally:
        server.stop()
        chain.publisher.close(10)


def test_two_workers_and_a_kv_head_that_both_hold_serve_every_version(place):
    chain, server, _ = place
    walk(chain, server)


@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        ("attach", 1),
        ("stage", 0),
        ("write", 1),
        *(pytest.param(*other, marks=pytest.mark.nightly) for other in [("attach", 0), ("stage", 1), ("write", 0)]),
    ],
)
def test_a_failure_in_one_worker_leaves_both_in_step_and_the_next_update_works(place, rank, moment):
    chain, server, fault = place
    with EngineClient(server.url) as engine, Follower(chain.url, engine) as follower:
        follower.step()
        before = len(chain.versions) - 1
        assert_served(chain, engine, before)
        chain.publish()
        if moment == "attach":
            assert engine.init((fault.parent / "elsewhere").as_uri()).error is not None
        fault.write_text(f"{rank} {moment}")
        if moment == "attach":
            assert "injected into attach" in engine.init(copy_of(chain, fault.parent, rank)).error.message
        else:
            with pytest.raises(EngineError, match=f"worker {rank}: injected into {moment}"):
                follower.step()
            assert_served(chain, engine, before)
        fault.unlink()
        assert follower.step().version == before + 1
        assert_served(chain, engine, before + 1)
        assert len(server.logprobs([1, 2, 3])) == 8


def test_both_workers_refuse_a_follower_that_has_lost_the_server_and_stay_in_step(place):
    chain, server, _ = place
    with Follower(chain.url, EngineClient(server.url)) as first, EngineClient(server.url) as engine:
        first.step()
        served = len(chain.versions) - 1
        chain.publish()
        assert engine.init(chain.url).error.kind == "AnotherFollower"
        with Follower(chain.url, EngineClient(server.url), pin=served) as second:
            assert second.step() is None
            for _ in range(2):
                with pytest.raises(AnotherFollower, match=f"pid {os.getpid()} on"):
                    first.step()
                with pytest.raises(AnotherFollower):
                    first.engine.stage(chain.url, served + 1)
            first.engine.start()
            first.engine.start()
            first.engine.update(chain.url, chain.publisher.position)
            first.engine.finish(None)
            first.engine.finish(None)
            assert_served(chain, engine, served)
    with Follower(chain.url, EngineClient(server.url)) as third:
        assert third.step().version == served + 1
        with EngineClient(server.url) as engine:
            assert_served(chain, engine, served + 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_cannot_finish_an_update_answers_in_step_and_serves_what_the_other_does(place, rank):
    chain, server, fault = place
    with Follower(chain.url, EngineClient(server.url)) as follower, EngineClient(server.url) as engine:
        follower.step()
        fault.write_text(f"{rank} confirm")
        version = chain.publish()
        assert follower.step().version == version
        assert "injected into confirm" in engine.status().error.message
        assert_served(chain, engine, version)
        fault.unlink()
        version = chain.publish()
        assert follower.step().version == version
        assert_served(chain, engine, version)
        assert engine.status().error is None


def test_no_forward_pass_sees_two_versions_within_a_worker_or_between_them(place):
    chain, server, fault = place
    journal, done = fault.parent / "journal", threading.Event()

    def generate():
        while not done.is_set():
            server.logprobs([1, 2, 3], length=100)

    with Follower(chain.url, EngineClient(server.url)) as follower, ThreadPoolExecutor(2) as pool:
        follower.step()
        (journal / "on").touch()
        streams = [pool.submit(generate) for _ in range(2)]
        try:
            await_passes(journal)
            for _ in range(4):
                chain.publish()
                follower.step()
                await_passes(journal)
        finally:
            done.set()
        for stream in streams:
            stream.result(PATIENCE)
        (journal / "on").unlink()
    both = list(zip(passes_of(journal, 0), passes_of(journal, 1), strict=True))
    assert all(before == after for passes in both for before, after in passes)
    versions = {tuple(before for before, _ in passes) for passes in both}
    assert [len({version[rank] for version in versions}) for rank in range(2)] == [len(versions)] * 2
    assert len(versions) == 5


def await_passes(journal):
    enough = len(passes_of(journal, 0)) + 5
    until(lambda: len(passes_of(journal, 0)) >= enough)


def passes_of(journal, rank):
    """The weights before and after each forward pass that a worker has finished."""
    path = journal / str(rank)
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(line.split()) for line in lines if len(line.split()) == 2]


def copy_of(chain, folder, rank):
    """Another address of the same bucket, to attach to."""
    link = folder / f"link-{rank}"
    link.symlink_to(chain.url.removeprefix("file://"))
    return link.as_uri()


@pytest.mark.skipif(not every, reason="starts two servers: `make test-vllm`")
def test_a_killed_worker_ends_the_server_and_a_new_one_is_brought_to_the_newest_version(place, tmp_path):
    chain, server, _ = place
    mine = psutil.Process(server.pid).children(recursive=True)
    workers = [process for process in mine if "Worker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    with Follower(chain.url, EngineClient(server.url)) as follower:
        follower.step()
        chain.publish()
        os.kill(workers[1].pid, signal.SIGKILL)
        with pytest.raises(EngineError):
            for _ in range(100):
                follower.step()
                chain.publish()
        server.stop()
        again = Server(server.model, tmp_path / "again.log", options=TP2, port=server.port, **TWO)
        try:
            again.wait()
            assert follower.step() is not None
            with EngineClient(again.url) as engine:
                assert_served(chain, engine, len(chain.versions) - 1)
        finally:
            again.stop()
