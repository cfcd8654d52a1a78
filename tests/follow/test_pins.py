"""A server held at a version that people named, by the command line and by the environment of a unit."""

import os

import pytest
from small import Fused, SmallRun, make_weights
from stub_engine import StubEngine
from verbs import say

from deltawire.errors import BadSignature, NotFound
from deltawire.runlog.signing import generate_key


@pytest.fixture
def engine():
    with StubEngine(Fused(make_weights())) as engine:
        yield engine


@pytest.fixture
def run(tmp_path):
    """A run of four versions in a folder; version 1 has a tag."""
    with SmallRun(tmp_path / "bucket") as run:
        for _ in range(3):
            run.publish(a=0.01)
        say("tag", 1, "good", "--bucket", run.url)
        yield run


def follow(run: SmallRun, engine: StubEngine, *options: object, **environ: str) -> str:
    return say("follow", "--bucket", run.url, "--engine", engine.url, "--once", *options, **environ)


def test_a_pin_may_be_a_tag_or_a_number(run, engine):
    assert "version 3" in follow(run, engine)
    assert "version 1:" in follow(run, engine, "--pin", "good")
    assert "version 2:" in follow(run, engine, "--pin", "2")
    assert "version 1:" in follow(run, engine, DELTAWIRE_PIN="good")
    with pytest.raises(NotFound, match="tags there: good"):
        follow(run, engine, "--pin", "bad")


def test_a_unit_sets_bucket_and_engine_in_its_environment(run, engine):
    told = say("follow", "--once", DELTAWIRE_BUCKET=run.url, DELTAWIRE_ENGINE=engine.url, DELTAWIRE_JSON="1")
    assert '"event":"update"' in told and '"version":3' in told
    assert "DELTAWIRE_BUCKET" not in os.environ


def test_a_follower_that_trusts_a_key_takes_no_strangers_tag_for_a_pin(engine, tmp_path):
    mine, stranger = (generate_key(tmp_path / name) for name in ("mine", "stranger"))
    with SmallRun(tmp_path / "bucket", signing_key=tmp_path / "mine") as run:
        run.publish(a=0.01)
        for name in ("mine", "stranger"):
            say("tag", 0, name, "--bucket", run.url, "--key", tmp_path / name)
        trusted = ("--trust", mine.public, "--state", tmp_path / "state")
        with pytest.raises(BadSignature, match=stranger.public[:16]):
            follow(run, engine, "--pin", "stranger", *trusted)
        assert "version 0:" in follow(run, engine, "--pin", "mine", *trusted)
