"""Many followers on one bucket: whatever dies and comes back, all serve the newest version and say so in heartbeats."""

from contextlib import ExitStack

import pytest
from running import Running, assert_at_rest, served
from small import Fused, SmallRun, make_weights
from stub_engine import StubEngine
from waiting import until

from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.runlog import heartbeats
from deltawire.upkeep.compactor import Compactor


@pytest.fixture
def place(tmp_path):
    """A run, three servers on its first version, and a follower of each."""
    with SmallRun(tmp_path / "bucket") as run, ExitStack() as stack:
        engines = [stack.enter_context(StubEngine(run.model(0))) for _ in range(3)]
        yield run, engines, [stack.enter_context(Running(run, engine)) for engine in engines], stack


def restart_in_the_middle(run, engine):
    """At the next update the server answers nothing sensible, and is a new one on the checkpoint it starts from."""

    def restarted(request):
        engine.worker = LiveWorker(run.model(0), loading=AfterLoading())
        engine.paused, engine.weight_version = False, "default"
        engine.session_open = False
        del engine.faults["/update_weights"]
        return 500, {"error": {"message": "the engine is dead"}}

    engine.faults["/update_weights"] = restarted


def test_a_fleet_converges_when_a_server_restarts_a_follower_is_replaced_and_a_late_one_joins(place, tmp_path):
    run, engines, running, stack = place
    run.publish(a=1)
    until(lambda: [served(engine) for engine in engines] == [1, 1, 1])
    restart_in_the_middle(run, engines[0])
    running[1].follower.close()
    running[1].join()
    run.publish(b=1)
    until(lambda: (served(engines[0]), served(engines[2])) == (2, 2))
    assert "/update_weights" not in engines[0].faults
    assert served(engines[1]) == 1
    for _ in range(6):
        run.publish(a=1)
    with Compactor(run.publisher.bucket, tmp_path / "mirror", anchors=5) as compactor:
        compactor.step()
    engines.append(stack.enter_context(StubEngine(Fused(make_weights(seed=9)))))
    for engine in (engines[1], engines[3]):
        running.append(stack.enter_context(Running(run, engine)))

    def told():
        return {
            beat.replica: (beat.version, beat.lag, beat.error) for _, beat in heartbeats.read_all(run.publisher.bucket)
        }

    until(lambda: list(told().values()) == [(8, 0, None)] * 4)
    for engine in engines:
        assert_at_rest(engine, run, 8)
    assert all(one.ended_by is None for one in running)
