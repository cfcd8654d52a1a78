"""The doctor finds each fault that is planted, names its fix, and says of a sound place that it is sound."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from runs import fresh, model, publish_all
from small import Fused, SmallRun, make_weights
from small_s3 import SmallS3, small_s3
from stub_engine import StubEngine
from verbs import run_verb

import deltawire as dw
from deltawire.buckets.forwarding import Forwarding
from deltawire.errors import AccessRefused
from deltawire.fleet import doctor_bucket, doctor_engine
from deltawire.fleet.doctor import examine
from deltawire.follow.follower import Follower
from deltawire.follow.options import FollowOptions
from deltawire.runlog import signing
from deltawire.runlog.keys import HEAD_KEY
from deltawire.runlog.records import Head, write
from deltawire.vllm.client import EngineClient


@pytest.fixture
def run(tmp_path):
    with SmallRun(tmp_path / "bucket") as run:
        run.publish(a=1)
        yield run


@pytest.fixture
def engine(run):
    """A server on the run's first version that says which vLLM it is."""
    with StubEngine(run.model()) as engine:
        engine.faults["/version"] = lambda request: (200, {"version": "0.32.0"})
        yield engine


def found(findings):
    """What was found, by check; every fault says how to mend it."""
    by_check = {}
    for one in findings:
        assert one.level != "fault" or one.fix, one
        if one.check not in by_check or one.level == "fault":
            by_check[one.check] = one
    return by_check


def the_fault(findings):
    """The only fault among these."""
    (one,) = [one for one in found(findings).values() if one.level == "fault"]
    return one


def engine_findings(run, engine, addresses=()):
    return doctor_engine.engine(dw.open_bucket(run.url), engine.url, addresses=addresses)


class Refusing(Forwarding):
    """A bucket that refuses some verbs."""

    def __init__(self, bucket, *verbs):
        super().__init__(bucket)
        self._verbs = verbs

    def _call(self, ask, key):
        return ask()

    def __getattribute__(self, name):
        if name in object.__getattribute__(self, "__dict__").get("_verbs", ()):
            raise_refusal(name)
        return super().__getattribute__(name)


def raise_refusal(name):
    raise AccessRefused(f"the token may not {name} here")


class Skewed(Forwarding):
    """A store whose clock is wrong."""

    def __init__(self, bucket, seconds):
        super().__init__(bucket)
        self._seconds = seconds

    def stat(self, key):
        found = super().stat(key)
        return replace(found, modified=found.modified + self._seconds)


def test_a_sound_place_has_no_fault_and_nothing_is_left_behind(run, engine):
    bucket = dw.open_bucket(run.url)
    before = [stat.key for stat in bucket.list()]
    seen = found(examine(bucket, engine.url))
    assert {one.level for one in seen.values()} <= {"ok", "note"}, seen
    wanted = {"read", "write", "delete", "conditional writes", "clock", "head", "run", "signatures", "version"}
    assert seen.keys() >= wanted | {"dev endpoints", "exposure", "plugin", "lease", "worker", "model"}
    assert [stat.key for stat in bucket.list()] == before
    assert engine.worker.position is None, "nothing was followed by that"


def test_a_server_that_is_followed_is_seen_to_be(run, engine):
    with Follower(run.url, EngineClient(engine.url), FollowOptions(replica="mine")) as follower:
        follower.step()
        seen = found(engine_findings(run, engine))
    assert {one.level for one in seen.values()} == {"ok"}, seen
    assert "mine" in seen["lease"].said and ":1" in seen["worker"].said and "prepacking" in seen


@pytest.mark.parametrize(
    ("verb", "check", "fix"),
    [("stat", "read", "right to read"), ("put", "write", "right to write"), ("delete", "delete", "prune")],
)
def test_a_right_that_is_missing_is_named(run, verb, check, fix):
    one = the_fault(doctor_bucket.rights(Refusing(dw.open_bucket(run.url), verb), read_only=False))
    assert one.check == check and fix in one.fix


def test_a_bucket_whose_name_is_misspelt_is_said_and_not_made(tmp_path):
    url = (tmp_path / "bukcet").as_uri()
    one = the_fault(examine(dw.open_bucket(url)))
    assert one.check == "read" and "check the address" in one.fix
    assert not (tmp_path / "bukcet").exists()
    empty = found(examine(fresh()))
    assert empty["read"].level == "note" and empty["write"].level == "ok"


def test_a_host_that_only_follows_is_not_asked_to_write(run):
    seen = found(doctor_bucket.rights(Refusing(dw.open_bucket(run.url), "put"), read_only=True))
    assert seen["write"].level == "note"


def test_a_store_that_ignores_conditions_is_found():
    with small_s3(SmallS3(conditional="ignored")):
        seen = found(doctor_bucket.rights(dw.open_bucket("s3://bucket/run"), read_only=False))
    one = seen["conditional writes"]
    assert one.level == "fault" and "one trainer" in one.fix


@pytest.mark.parametrize(("seconds", "said"), [(300, "300 s ahead of"), (-300, "300 s behind")])
def test_a_clock_that_is_wrong_is_found(run, seconds, said):
    one = the_fault(doctor_bucket.rights(Skewed(dw.open_bucket(run.url), seconds), read_only=False))
    assert one.check == "clock" and said in one.said and "NTP" in one.fix


def test_a_trainer_whose_clock_is_ahead_is_found(tmp_path):
    bucket = fresh()
    publish_all(bucket, model(), clock=lambda: time.time() + 100)
    one = the_fault(doctor_bucket.records(bucket, run=None, trusted=()))
    assert one.check == "trainer's clock" and "in the future" in one.said


@pytest.mark.parametrize("damage", ["older", "missing", "damaged"])
def test_a_head_that_is_stale_missing_or_damaged_is_found(run, damage):
    bucket = dw.open_bucket(run.url)
    key = f"runs/{run.publisher.position.run}/commits/000000.json"
    if damage == "older":
        bucket.put(HEAD_KEY, write(Head(run.publisher.position.run, 0, key)))
    elif damage == "missing":
        bucket.delete(HEAD_KEY)
    else:
        bucket.put(HEAD_KEY, b"{")
    one = the_fault(doctor_bucket.records(bucket, run=None, trusted=()))
    assert one.check == "head" and "next commit mends it" in one.fix


def test_another_run_than_the_one_that_is_meant_is_found_and_one_that_continues_it_is_not(run):
    bucket, first = dw.open_bucket(run.url), run.publisher.position.run
    one = the_fault(doctor_bucket.records(bucket, run="f" * 16, trusted=()))
    assert one.check == "run" and f"--run {first}" in one.fix
    publish_all(bucket, run.weights, run="supersede")
    assert not [one for one in doctor_bucket.records(bucket, run=first, trusted=()) if one.level == "fault"]


def test_a_signature_that_is_missing_or_another_is_found(run, tmp_path):
    mine, other = (signing.generate_key(tmp_path / name).public for name in ("mine", "other"))
    unsigned = the_fault(doctor_bucket.records(dw.open_bucket(run.url), run=None, trusted=[mine]))
    assert unsigned.check == "signatures" and "keygen" in unsigned.fix
    bucket = fresh()
    publish_all(bucket, model(), signing_key=tmp_path / "mine")
    assert the_fault(doctor_bucket.records(bucket, run=None, trusted=[other])).check == "signatures"
    assert found(doctor_bucket.records(bucket, run=None, trusted=[mine]))["signatures"].level == "ok"
    assert mine in found(doctor_bucket.records(bucket, run=None, trusted=()))["signatures"].fix


@pytest.mark.parametrize("version", ["0.31.2", "0.40.0"])
def test_a_vllm_out_of_range_is_found(run, engine, version):
    engine.faults["/version"] = lambda request: (200, {"version": version})
    one = the_fault(engine_findings(run, engine))
    assert one.check == "version" and version in one.said and "0.32 to 0.33" in one.fix


def test_no_server_is_found(run, engine):
    engine.stop()
    one = the_fault(engine_findings(run, engine))
    assert one.check == "engine" and "start vLLM" in one.fix


def test_missing_dev_endpoints_are_found(run, engine):
    engine.faults["/is_paused"] = lambda request: (404, {"detail": "Not Found"})
    one = the_fault(engine_findings(run, engine))
    assert one.check == "dev endpoints" and "VLLM_SERVER_DEV_MODE=1" in one.fix


def test_dev_endpoints_that_others_reach_are_found(run, engine):
    one = the_fault(engine_findings(run, engine, addresses=["127.0.0.2", "127.0.0.1"]))  # the latter stands for others
    assert one.check == "exposure" and "127.0.0.1 too" in one.said and "--host 127.0.0.1" in one.fix
    assert found(engine_findings(run, engine, addresses=["127.0.0.2"]))["exposure"].level == "ok"
    assert not [address for address in doctor_engine.own_addresses() if address.startswith("127.")]


def test_a_missing_plugin_is_found(run, engine):
    engine.faults["/collective_rpc"] = lambda request: (500, {"error": {"message": "no attribute deltawire_status"}})
    one = the_fault(engine_findings(run, engine))
    assert one.check == "plugin" and "pip install deltawire" in one.fix


def test_a_backend_that_was_not_chosen_is_found(run, engine):
    engine._seats[0].weight_transfer_engine = object()
    one = the_fault(engine_findings(run, engine))
    assert one.check == "backend" and '{"backend":"deltawire"}' in one.fix


def test_a_worker_that_does_not_reach_the_bucket_is_found(run, engine, monkeypatch):
    def refuse(url):
        raise AccessRefused(f"{url}: the worker's token may not read here")

    monkeypatch.setattr("deltawire.live.model.open_bucket", refuse)
    one = the_fault(engine_findings(run, engine))
    assert one.check == "worker" and "may not read here" in one.said and "--pass-endpoint" in one.fix


def test_a_model_that_is_another_is_found(run):
    class Other(Fused):
        def load_weights(self, weights):
            super().load_weights((name, tensor) for name, tensor in weights if name != "b")

    with StubEngine(Other(make_weights())) as engine:
        engine.faults["/version"] = lambda request: (200, {"version": "0.33.1"})
        one = the_fault(engine_findings(run, engine))
    assert one.check == "model" and "materialize" in one.fix


PACKED = SimpleNamespace(prefix="layers.0")
"""what is repeated of a module at every update"""


def test_weights_that_are_packed_are_found(run, engine, monkeypatch):
    with Follower(run.url, EngineClient(engine.url)) as follower:
        follower.step()
        monkeypatch.setattr("deltawire.live.live_weights.LiveWeights.remade", lambda live: [PACKED])
        one = the_fault(engine_findings(run, engine))
    assert one.check == "prepacking" and "layers.0" in one.said and "DELTAWIRE_PREPACK" in one.fix


def test_a_server_that_another_buckets_follower_drives_is_found(run, engine):
    with (
        SmallRun() as other,
        Follower(other.url, EngineClient(engine.url), FollowOptions(replica="theirs")) as follower,
    ):
        follower._greet()
        one = the_fault(engine_findings(run, engine))
    assert one.check == "lease" and "theirs" in one.said and "--take-over" in one.fix


def test_a_server_whose_bucket_moved_to_a_foreign_run_is_found(run, engine, tmp_path):
    with Follower(run.url, EngineClient(engine.url)) as follower:
        follower.step()
        bucket = dw.open_bucket(run.url)
        with SmallRun(tmp_path / "second", seed=3) as second:
            copy = dw.open_bucket(second.url)
            for stat in copy.list():
                bucket.put(stat.key, copy.get(stat.key, limit=1 << 20))
            one = the_fault(engine_findings(run, engine))
            assert one.check == "run" and second.publisher.position.run in one.said


def test_the_verb_prints_fixes_that_can_be_copied_and_ends_with_1_on_a_fault(run, engine):
    done = run_verb("doctor", "--bucket", run.url, "--engine", engine.url)
    assert "ok     write: " in done.stdout and "fault" not in done.stdout
    engine._seats[0].weight_transfer_engine = object()
    done = run_verb("doctor", "--bucket", run.url, "--engine", engine.url, code=1)
    assert """fix: start vLLM with --weight-transfer-config '{"backend":"deltawire"}'""" in done.stdout
    told = run_verb("doctor", "--bucket", run.url, "--engine", engine.url, "--json", code=1)
    assert [one["check"] for one in map(json.loads, told.stdout.splitlines()) if one["level"] == "fault"] == ["backend"]
