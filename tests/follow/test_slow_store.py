"""Whatever a bucket does (hangs, trickles, refuses), the server generates as without us, and the follower says why."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import boto3
import pytest
from servers import START_SECONDS, tiny_qwen3
from slow_store import SlowWay
from small import SmallRun
from stub_engine import StubEngine
from waiting import PATIENCE, until

import deltawire as dw
from deltawire.buckets import environment
from deltawire.errors import EngineUnavailable, NotFound, Unavailable
from deltawire.follow import server as driven
from deltawire.follow.follower import Follower
from deltawire.live import model, worker
from deltawire.live.live_weights import LiveWeights
from deltawire.live.messages import Staged
from deltawire.vllm.client import EngineClient

WORKER = "deltawire-stage"


@pytest.fixture
def engine(run):
    with StubEngine(run.model()) as engine:
        yield engine


@pytest.fixture
def door(monkeypatch):
    """A store that answers the workers nothing while the door is shut: `shut()`, `open()`, `open_for(url)`."""
    opened, others = threading.Event(), set()
    opened.set()
    original = model.open_bucket

    class Door:
        open, shut, open_for = opened.set, opened.clear, others.add

    def behind(url, **options):
        bucket = original(url, **options)
        for verb in ("get", "get_file", "stat", "list"):
            if url not in others:
                setattr(bucket, verb, waiting(getattr(bucket, verb)))
        return bucket

    def waiting(verb):
        def answer(*arguments, **options):
            assert opened.wait(PATIENCE)
            return verb(*arguments, **options)

        return answer

    monkeypatch.setattr(model, "open_bucket", behind)
    yield Door
    opened.set()


def test_a_bucket_that_hangs_when_it_is_opened_or_read_holds_no_call_of_the_server(run, engine, door, monkeypatch):
    monkeypatch.setattr(driven, "SLOW", 0.05)
    problems = []
    with (
        Follower(run.url, EngineClient(engine.url), on_problem=problems.append) as following,
        EngineClient(engine.url) as client,
        ThreadPoolExecutor() as pool,
    ):
        door.shut()
        step = pool.submit(following.step)
        until(lambda: len(problems) == 1, unless=step.done)
        assert f"opening {run.url} since" in str(problems[0])
        assert client.status().doing == f"opening {run.url}"
        assert following.health.problem == str(problems[0])
        door.open()
        assert step.result(PATIENCE) is None
        assert following.health.problem is None
        door.shut()
        run.publish(a=1)
        step = pool.submit(following.step)
        until(lambda: len(problems) == 2, unless=step.done)
        assert f"staging version 1 of {run.url} since" in str(problems[1])
        assert "/pause" not in engine.calls
        door.open()
        assert step.result(PATIENCE).version == 1


def test_a_bucket_that_never_answers_is_left_for_another_at_once(run, engine, door):
    with SmallRun(seed=1) as other, EngineClient(engine.url) as client:
        door.shut()
        client.begin_init(run.url)
        until(lambda: client.status().reading == run.url)
        hanging = next(thread for thread in threading.enumerate() if thread.name == WORKER)
        door.open_for(other.url)
        with Follower(other.url, EngineClient(engine.url)) as following:
            assert following.step().version == 0
            assert hanging.is_alive()
            door.open()
            hanging.join(PATIENCE)
            assert (client.status().attached, client.status().error) == (following.bucket.url, None)
            assert client.audit().mismatched == []


def test_an_audit_that_waits_for_the_bucket_holds_no_call_and_is_answered_in_the_end(run, engine, door):
    with EngineClient(engine.url) as client, ThreadPoolExecutor() as pool:
        door.shut()
        audit = pool.submit(client.audit, run.url)
        until(lambda: client.status().doing == "auditing", unless=audit.done)
        other = pool.submit(client.audit, run.url)
        door.open()
        for found in (audit, other):
            assert (found.result(PATIENCE).mismatched, found.result().tensors) == ([], 3)


def test_an_audit_that_fails_says_why(run, engine):
    with EngineClient(engine.url) as client:
        with pytest.raises(NotFound):
            client.audit("memory://nothing-here")
        assert client.audit(run.url).mismatched == []


def test_memory_is_digested_on_a_thread_of_ours_and_the_loader_watched_on_the_servers(run, engine, monkeypatch):
    digested, probed = set(), set()
    model = engine.worker.model
    load, digests = model.load_weights, LiveWeights.digests

    def loading(weights):
        probed.add(threading.current_thread().name)
        return load(weights)

    def digesting(live):
        digested.add(threading.current_thread().name)
        return digests(live)

    monkeypatch.setattr(model, "load_weights", loading)
    monkeypatch.setattr(LiveWeights, "digests", digesting)
    with Follower(run.url, EngineClient(engine.url)) as following:
        following.step()
        following.audit()
    assert digested == {WORKER}
    assert WORKER not in probed
    assert len(probed) == 1


def test_a_plain_post_waits_for_a_slow_bucket_only_so_long_and_is_taken_when_posted_again(
    run, engine, door, monkeypatch
):
    monkeypatch.setattr(worker, "PLAIN_WAIT", 0.05)
    run.publish(a=1)
    door.shut()
    body = {"update_info": {"bucket": run.url, "version": 1}}
    with EngineClient(engine.url) as client:
        client.start()
        engine.do("/update_weights", body)
        error = client.status().error
        assert (error.kind, "post it again" in error.message) == ("EngineUnavailable", True)
        door.open()
        until(lambda: client.status().staged == Staged(1))
        engine.do("/update_weights", body)
        assert (client.status().error, client.status().position.version) == (None, 1)


def test_plain_posts_alone_attach_update_and_audit(run, engine):
    run.publish(a=1)
    for path, body in (
        ("/init_weight_transfer_engine", {"init_info": {"bucket": run.url}}),
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": {"bucket": run.url, "version": 1}}),
        ("/finish_weight_update", {}),
        ("/init_weight_transfer_engine", {"init_info": {"bucket": f"{run.url}/"}}),
    ):
        engine.do(path, body)
    with EngineClient(engine.url) as client:
        audit = client.audit()
    assert (audit.position.version, audit.mismatched) == (1, [])


def test_an_update_is_not_written_while_memory_is_read(run, engine, door):
    with EngineClient(engine.url) as client, ThreadPoolExecutor() as pool:
        client.init(run.url)
        run.publish(a=1)
        client.start()
        client.stage(run.url, 1)
        until(lambda: client.status().staged)
        door.shut()
        with SmallRun(seed=1) as other:
            audit = pool.submit(client.audit, other.url)
            until(lambda: client.status().doing, unless=audit.done)
            engine.do("/update_weights", {"update_info": {"bucket": run.url, "version": 1}})
            assert client.status().error.kind == EngineUnavailable.__name__
            assert client.status().position.version == 0
            door.open()
            audit.result(PATIENCE)
        engine.do("/update_weights", {"update_info": {"bucket": run.url, "version": 1}})
        assert client.status().position.version == 1


def test_what_two_processes_see_of_a_store_is_compared_without_any_secret():
    mine = environment.seen(
        "hf://buckets/me/x",
        {
            "HF_ENDPOINT": "http://127.0.0.1:8100",
            "HF_TOKEN": "hf_secret",
            "AWS_REGION": "here",
            "HTTPS_PROXY": "http://me:secret@proxy:1",
        },
    )
    assert "secret" not in str(mine)
    assert environment.differences({"HF_TOKEN": "set"}, mine) == [
        "HF_ENDPOINT is unset there, yours is http://127.0.0.1:8100",
        "HTTPS_PROXY is unset there, yours is http://…@proxy:1",
    ]
    s3 = {
        "AWS_REGION": "here",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_ENDPOINT_URL": "http://me:secret@store",
        "HF_TOKEN": "x",
    }
    assert environment.endpoints("s3://bucket/x", s3) == {"AWS_REGION": "here"}


def test_only_where_a_store_is_can_be_handed_over(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mine")
    with environment.applied("hf://buckets/me/x", {"HF_ENDPOINT": "http://theirs", "HF_TOKEN": "x", "LD_PRELOAD": "x"}):
        seen = environment.os.environ
        assert seen["HF_ENDPOINT"] == "http://theirs"
        assert "x" not in (seen.get("HF_TOKEN"), seen.get("LD_PRELOAD"))
    assert environment.os.environ["HF_ENDPOINT"] == "http://mine"


class Completing:
    """Asks a server for tokens, one request after another; `taken` are the seconds that each took."""

    def __init__(self, server) -> None:
        self._server, self._done, self.taken = server, threading.Event(), []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Completing":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set():
            started = time.monotonic()
            assert len(self._server.logprobs([1, 2, 3], length=4)) == 4
            self.taken.append(time.monotonic() - started)


@pytest.mark.vllm
@pytest.mark.timeout(2 * START_SECONDS)
def test_on_vllm_completions_are_answered_as_before_while_s3_refuses_hangs_and_trickles(
    server, checkpoint, s3_endpoint, s3_url, monkeypatch
):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")  # vLLM's worker was started without keys
    monkeypatch.setattr(driven, "SLOW", 1.0)
    everything = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
    boto3.client("s3", endpoint_url=s3_endpoint).put_bucket_policy(Bucket=urlsplit(s3_url).netloc, Policy=policy)
    way, problems = SlowWay(urlsplit(s3_endpoint).port), []
    server.logprobs([1, 2, 3])  # the first of all takes longer
    model = tiny_qwen3()
    with (
        dw.Publisher(dw.open_bucket(s3_url), assets=checkpoint) as publisher,
        Follower(s3_url, EngineClient(server.url), pass_endpoint=True, on_problem=problems.append) as following,
        EngineClient(server.url) as engine,
        Completing(server) as completing,
        ThreadPoolExecutor() as pool,
    ):
        publisher.publish(model.named_parameters())
        publisher.flush(30)
        until(lambda: len(completing.taken) > 20)
        before = completing.taken.copy()
        following.settings["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        with pytest.raises(Unavailable) as refused:
            following.step()
        assert "AWS_ENDPOINT_URL is http://127.0.0.1:9 there, yours is " + s3_endpoint in str(refused.value)
        assert "AWS_ACCESS_KEY_ID is unset there, yours is set" in str(refused.value)

        following.settings["AWS_ENDPOINT_URL"], way.mode = way.url, "hang"
        step = pool.submit(following.step)
        until(lambda: problems and way.hanging, unless=step.done)
        assert f"vLLM's worker: opening {s3_url} since" in str(problems[0])
        asked = len(completing.taken)
        until(lambda: len(completing.taken) > asked + 3)
        way.mode = "pass"
        step.result(PATIENCE)

        for parameter in model.parameters():
            parameter.data += 0.01
        publisher.publish(model.named_parameters())
        publisher.flush(30)
        way.mode = "trickle"
        assert following.step().version == 1
        assert engine.audit().mismatched == []
        way.close()
    assert max(completing.taken) < 5 * max(before) + 2, (before, completing.taken)  # it took 23 seconds, or for ever
