"""Any engine can be followed that implements the port: here one in memory, of one worker or two."""

import ast
from pathlib import Path

import pytest
from memory_engine import MemoryEngine
from small import Shard

import deltawire as dw
from deltawire.errors import EngineUnavailable
from deltawire.follow.engine import Engine
from deltawire.follow.follower import Follower
from deltawire.follow.options import FollowOptions

SOURCE = Path(dw.__file__).parent


@pytest.fixture(params=[1, 2], ids=["one worker", "two"])
def place(request, run):
    """An engine on version 0, and what it serves."""
    if request.param == 1:
        models = [run.model()]
        return MemoryEngine(*models), models[0].served
    models = [Shard(run.versions[0], rank) for rank in range(2)]
    return MemoryEngine(*models), lambda: Shard.served(models)


def assert_serves(place, run, version):
    engine, served = place
    assert dw.equal(served(), run.versions[version])
    assert (engine.paused, engine.session_open) == (False, False)
    assert engine.reported == f"{run.publisher.position.run}:{version}"
    assert engine.audit().mismatched == []


def test_an_engine_that_has_only_the_port_is_followed_pinned_audited_and_repaired(place, run):
    engine, _ = place
    with Follower(run.url, engine) as follower:
        assert follower.step() is None
        assert_serves(place, run, 0)
        for version in range(1, 3):
            run.publish(a=1, v=-1)
            assert follower.step().from_version == version - 1
            assert_serves(place, run, version)
        engine.workers[0].model.v.data[3] = 42.0
        assert follower.audit().mismatched == ["v"]
        assert follower.step().from_version is None
        assert_serves(place, run, 2)
    with Follower(run.url, engine, FollowOptions(pin=2), pin=1) as pinned:
        assert pinned.step().version == 1
        assert_serves(place, run, 1)
    with pytest.raises(TypeError, match="pn"):
        Follower(run.url, engine, pn=1)


@pytest.mark.parametrize("late", [False, True], ids=["before it acts", "after it acted"])
@pytest.mark.parametrize("call", ["begin_init", "start", "pause", "update", "finish", "resume", "label"])
def test_whichever_call_of_the_port_fails_the_next_step_serves_the_version(place, run, call, late):
    engine, _ = place
    with Follower(run.url, engine) as follower:
        if call not in ("begin_init", "label"):
            follower.step()
            run.publish(a=1)
        engine.fault, engine.late = call, late
        with pytest.raises(EngineUnavailable, match=f"{call} fails"):
            follower.step()
        engine.fault = ""
        follower.step()
        assert_serves(place, run, len(run.versions) - 1)


def test_the_stand_in_implements_the_port_and_nothing_of_what_is_built_on_it():
    own = {name for name in vars(MemoryEngine) if not name.startswith("_")}
    assert own & {name for name in dir(Engine) if callable(getattr(Engine, name))} == Engine.__abstractmethods__


def test_nothing_in_live_or_follow_names_vllm_but_its_prose():
    named = []
    for path in [*(SOURCE / "live").glob("*.py"), *(SOURCE / "follow").glob("*.py")]:
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            if id(node) not in prose and any("vllm" in word.lower() for word in words):
                named.append(f"{path.name}:{node.lineno}")
    assert named == []
