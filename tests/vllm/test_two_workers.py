"""Two real workers: whatever fails in one, both stay in step, both stay at one version, and the next update works."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from servers import Server
from test_models import TP2, TWO, Chain, assert_served, every, walk

from deltawire.errors import EngineError
from deltawire.vllm.client import EngineClient
from deltawire.vllm.follower import Follower

pytestmark = pytest.mark.vllm
PLUGIN = Path(__file__).parent / "faults_plugin"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A chain, a server of two workers over it, and the file that makes one of them fail."""
    folder = tmp_path_factory.mktemp("two")
    chain, fault = Chain(folder, "qwen3-one-kv-head"), folder / "fault"
    path = os.pathsep.join(filter(None, [str(PLUGIN), os.environ.get("PYTHONPATH")]))
    environ = {**TWO, "PYTHONPATH": path, "DELTAWIRE_TEST_FAULT": str(fault)}
    server = Server(chain.checkpoint, folder / "vllm.log", options=TP2, **environ)
    try:
        yield chain, server.wait(), fault
    finally:
        server.stop()
        chain.publisher.close(10)


def test_two_workers_and_a_kv_head_that_both_hold_serve_every_version(place):
    chain, server, _ = place
    walk(chain, server)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", ["init", "stage", "commit"])
def test_a_failure_in_one_worker_leaves_both_in_step_and_the_next_update_works(place, rank, step):
    chain, server, fault = place
    with Follower(chain.url, server.url) as follower, EngineClient(server.url) as engine:
        follower.step()
        before = len(chain.versions) - 1
        assert_served(chain, engine, before)
        chain.publish()
        if step == "init":
            assert engine.init((fault.parent / "elsewhere").as_uri()).error is not None
        fault.write_text(f"{rank} {step}")
        if step == "init":
            assert "injected into init" in engine.init(copy_of(chain, fault.parent, rank)).error["message"]
        else:
            with pytest.raises(EngineError, match=f"worker {rank}: injected into {step}"):
                follower.step()
            assert_served(chain, engine, before)
        fault.unlink()
        assert follower.step().version == before + 1
        assert_served(chain, engine, before + 1)
        assert len(server.logprobs([1, 2, 3])) == 8


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
    with Follower(chain.url, server.url) as follower:
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
