"""A follower and a worker understand each other, or say that they do not: verbs, protocols, fields of the future."""

import json

import pytest
from memory_engine import MemoryEngine
from small import SmallRun

from deltawire.errors import BadAnswer, EngineUnsupported, OtherProtocol
from deltawire.follow.follower import Follower
from deltawire.live import rpc
from deltawire.live.answers import ANSWERS, Seat, respond


@pytest.fixture
def run():
    with SmallRun() as run:
        run.publish(a=1)
        yield run


class OtherEngine(MemoryEngine):
    """An engine whose workers' answers are changed on their way, as those of another deltawire would differ."""

    changes: dict[str, object]

    def call_workers(self, method, argument):
        self.asked = json.loads(argument)
        return [
            {name: value for name, value in (answer | self.changes).items() if value is not ...}
            for answer in super().call_workers(method, argument)
        ]


@pytest.fixture
def engine(run):
    engine = OtherEngine(run.model())
    engine.changes = {}
    engine.init(run.url)
    return engine


def ask(engine, verb, **request):
    """The answer of the first worker to a request as a stranger may send it."""
    return respond(verb, json.dumps({"nonce": "n", **request}), lambda: Seat(engine.workers[0], 0, False))


def test_every_verb_of_the_table_has_an_answer():
    assert set(ANSWERS) == set(rpc.VERBS) == {verb.name for verb in rpc.VERBS.values()}


def test_a_verb_that_the_worker_does_not_know_is_refused_by_name(engine):
    refused = ask(engine, "teleport")["refused"]
    assert (refused["kind"], "'teleport'" in refused["message"]) == ("EngineUnsupported", True)
    unknown = rpc.Verb("teleport", rpc.STATUS.request, rpc.STATUS.answer)
    with pytest.raises(EngineUnsupported, match=f"deltawire {rpc.version()} knows no verb 'teleport'"):
        engine.ask(unknown, unknown.request())


def test_fields_that_a_worker_does_not_know_are_ignored(engine, run):
    assert ask(engine, "status", surprise={"of": ["the future"]})["position"]["version"] == 0
    assert ask(engine, "stage", bucket=run.url, version=1, surprise=1, protocol=rpc.PROTOCOL)["accepted"]


def test_fields_that_a_follower_does_not_know_are_ignored(engine, run):
    engine.changes = {"surprise": {"of": ["the future"]}}
    with Follower(run.url, engine) as follower:
        assert follower.step().version == 1


def test_a_request_that_lacks_a_field_is_refused_with_the_fields_there_are(engine):
    refused = ask(engine, "stage", version=1)["refused"]
    assert refused["kind"] == "EngineError"
    assert refused["message"].startswith("Stage is asked for by bucket, version: ")


@pytest.mark.parametrize("protocol", [0, rpc.PROTOCOL + 1, "1"])
def test_a_worker_does_nothing_for_a_follower_of_another_protocol_and_says_what_each_runs(engine, run, protocol):
    answer = ask(engine, "stage", bucket=run.url, version=1, protocol=protocol, deltawire="9.9")
    assert (answer["refused"]["kind"], answer["protocol"]) == ("OtherProtocol", rpc.PROTOCOL)
    assert "of deltawire 9.9, speaks protocol" in answer["refused"]["message"]
    assert answer["deltawire"] == rpc.version()
    assert (engine.status().staging, engine.status().staged) == (False, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": rpc.PROTOCOL + 1, "deltawire": "9.9"}, "which runs deltawire 9.9, speaks protocol 2"),
        ({"protocol": ..., "deltawire": ...}, "speaks protocol None"),
    ],
    ids=["newer", "from before there was a protocol"],
)
def test_a_follower_of_workers_that_speak_another_protocol_ends_and_says_to_restart_the_server(
    engine, run, changes, says
):
    engine.changes = changes
    with Follower(run.url, engine) as follower, pytest.raises(OtherProtocol, match=says) as ended:
        follower.run()
    assert str(ended.value).endswith(f": restart the test with deltawire {rpc.version()}")
    assert engine.calls == ["begin_init"]  # of the fixture
    assert (engine.asked["protocol"], engine.asked["deltawire"]) == (rpc.PROTOCOL, rpc.version())


def test_a_call_by_hand_names_no_protocol_and_is_answered(engine):
    assert ask(engine, "status")["protocol"] == rpc.PROTOCOL


@pytest.mark.parametrize("said", ["\ud800", {"\ud800": 1}, [[]], -1.5])
@pytest.mark.parametrize("field", ["staged", "error", "fetching", "joined"])
def test_an_answer_of_something_else_is_a_bad_answer(engine, field, said):
    engine.changes = {field: said}
    with pytest.raises(BadAnswer, match="status got no answer that it should get"):
        engine.status()


@pytest.mark.parametrize("field", ["rank", "session_open", "position", "joined"])
def test_an_answer_that_lacks_what_it_must_say_is_a_bad_answer(engine, field):
    engine.changes = {field: ...}
    with pytest.raises(BadAnswer, match=field):
        engine.status()
