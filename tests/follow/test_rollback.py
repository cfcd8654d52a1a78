"""Followers that trust a key are led back by no bucket: of a vLLM server, of adapters, of a module in this process."""

import json
import threading

import pytest
import torch
from small import SmallRun
from small_adapters import SmallAdapterRun
from stub_engine import StubEngine
from torch import nn
from verbs import run_verb
from waiting import PATIENCE, until

import deltawire as dw
from attacks.hostile import replay, roll_back
from deltawire.errors import FormatError, RolledBack
from deltawire.follow.follower import Follower
from deltawire.follow.news import Note
from deltawire.runlog import signing
from deltawire.torch import follow
from deltawire.vllm.client import EngineClient


@pytest.fixture
def key(tmp_path):
    return tmp_path / "trainer.key", signing.generate_key(tmp_path / "trainer.key")


@pytest.fixture
def run(key, tmp_path):
    with SmallRun(tmp_path / "bucket", signing_key=key[0]) as run:
        for _ in range(5):
            run.publish(**dict.fromkeys(list(run.weights)[:1], 0.01))
        yield run


@pytest.fixture
def engine(run):
    with StubEngine(run.model()) as engine:
        yield engine


def took_back(run, version=2):
    """Remove the newer commits, and leave a HEAD that cannot be read."""
    bucket = dw.open_bucket(run.url)
    with dw.Subscriber(bucket) as subscriber:
        roll_back(bucket, subscriber.run.run, version)


def served(engine):
    return engine.worker.status().position.version


def test_a_running_follower_goes_on_serving_what_it_serves(run, engine, key):
    problems = []
    follower = Follower(
        run.url, EngineClient(engine.url), trusted=[key[1].public], poll=0.01, on_problem=problems.append
    )
    with follower:
        follower.step()
        assert served(engine) == 5
        took_back(run)
        follower.source.refresh()  # as after any error: its records are read again
        thread = threading.Thread(target=follower.run)
        thread.start()
        until(lambda: any(isinstance(problem, RolledBack) for problem in problems))
        follower.stop()
        thread.join(PATIENCE)
    assert served(engine) == 5
    assert "RolledBack" in json.loads(
        dw.open_bucket(run.url).get(f"replicas/{follower.replica}.json", limit=1 << 16)
    )["error"]  # fmt: skip


def test_a_restarted_follower_remembers_by_default_and_goes_back_by_a_pin(run, engine, key):
    options = {"trusted": [key[1].public]}
    news = []
    with Follower(run.url, EngineClient(engine.url), on_news=news.append, **options) as follower:
        follower.step()
    assert [type(item) for item in news].count(Note) == 1
    took_back(run)
    with (
        Follower(run.url, EngineClient(engine.url), on_news=news.append, **options) as follower,
        pytest.raises(RolledBack),
    ):
        follower.step()
    assert served(engine) == 5
    with Follower(run.url, EngineClient(engine.url), pin=2, **options) as follower:
        assert follower.step().version == 2
    with Follower(run.url, EngineClient(engine.url), **options) as follower, pytest.raises(RolledBack):
        follower.step()
    with Follower(run.url, EngineClient(engine.url), forget_state=True, **options) as follower:
        follower.step()
    assert served(engine) == 2
    assert [type(item) for item in news].count(Note) == 1


def test_a_run_of_the_same_key_from_another_bucket_is_not_served_after_a_restart(run, engine, key, tmp_path):
    state = tmp_path / "state"
    options = {"trusted": [key[1].public], "state": state}
    with Follower(run.url, EngineClient(engine.url), **options) as follower:
        follower.step()
    with SmallRun(tmp_path / "other", seed=1, signing_key=key[0]) as other:
        other.publish(**dict.fromkeys(list(other.weights)[:1], 0.01))
        replay(dw.open_bucket(other.url), dw.open_bucket(run.url))
    with (
        Follower(run.url, EngineClient(engine.url), **options) as follower,
        pytest.raises(RolledBack, match="--forget-state"),
    ):
        follower.step()
    assert served(engine) == 5
    state.write_bytes(b"junk")
    with pytest.raises(FormatError, match="is damaged"):
        Follower(run.url, EngineClient(engine.url), **options)
    with Follower(run.url, EngineClient(engine.url), forget_state=True, **options) as follower:
        assert follower.step().version == 1


def test_without_keys_nothing_is_remembered(run, engine, tmp_path):
    with Follower(run.url, EngineClient(engine.url), state=tmp_path / "state") as follower:
        follower.step()
    assert not (tmp_path / "state").exists()


def test_the_command_line_says_what_to_do(run, engine, key, tmp_path):
    trusted = ("--bucket", run.url, "--engine", engine.url, "--trust", key[1].public, "--state", f"{tmp_path}/state/")
    first = run_verb("follow", *trusted, "--once", "--json")
    assert [json.loads(line)["event"] for line in first.stdout.splitlines()].count("note") == 1
    took_back(run)
    refused = run_verb("follow", *trusted, "--once", code=1)
    assert "RolledBack" in refused.stderr
    assert "--pin VERSION" in refused.stderr
    assert run_verb("follow", *trusted, "--once", "--run", "0" * 16, code=1).stderr.startswith("deltawire: OtherRun")
    assert "version 2" in run_verb("follow", *trusted, "--once", "--pin", "2").stdout


def test_adapters_are_not_taken_back(key, tmp_path):
    run = SmallAdapterRun(tmp_path, signing_key=key[0])
    for _ in range(3):
        run.publish()
    with StubEngine() as engine:
        with run.follower(engine, trusted=[key[1].public]) as follower:
            follower.step()
            took_back(run, 1)
            follower.source.refresh()
            with pytest.raises(RolledBack):
                follower.step()
        with run.follower(engine, trusted=[key[1].public]) as follower, pytest.raises(RolledBack):
            follower.step()
        assert set(engine.adapters) == {"lora@3"}
    run.publisher.close(10)


def test_a_module_is_not_taken_back_and_goes_back_when_told_to(key, tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))

    url, module, place = (tmp_path / "plain").as_uri(), Plain(), tmp_path / "seen"
    bucket = dw.open_bucket(url, create=True)
    with dw.Publisher(bucket, signing_key=key[0]) as publisher:
        for step in range(4):
            publisher.publish({"weight": torch.full((4, 2), float(step))})
            publisher.flush(PATIENCE)
    with follow(module, url, trusted=[key[1].public], state=place) as follower:
        assert follower.step().version == 3
        with dw.Subscriber(bucket) as subscriber:
            roll_back(bucket, subscriber.run.run, 1)
        with pytest.raises(RolledBack):
            follower.step()
        assert follower.step(0).version == 0
        with pytest.raises(RolledBack):
            follower.step()
    with follow(Plain(), url, trusted=[key[1].public], state=place) as follower, pytest.raises(RolledBack):
        follower.step()
    with follow(Plain(), url, trusted=[key[1].public]) as follower:  # who remembers nothing believes the bucket
        assert follower.step().version == 1


def test_a_follower_with_keys_tells_them_to_a_server_that_stands_on_the_bucket_already(run, engine, key, tmp_path):
    with Follower(run.url, EngineClient(engine.url)) as follower:
        follower.step()
    assert engine.worker.status().trusted == ()
    with Follower(run.url, EngineClient(engine.url), trusted=[key[1].public], base=tmp_path) as follower:
        follower.step()
    status = engine.worker.status()
    assert (status.trusted, status.base) == ((key[1].public,), str(tmp_path))
    assert served(engine) == 5
