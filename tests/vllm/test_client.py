"""What a server may answer: anything. Every wrong answer is one typed error, and a dropped connection is no answer."""

import base64
import json
import logging
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from small import Shard, SmallRun
from stub_engine import StubEngine
from waiting import PATIENCE, await_staging, until

from deltawire import open_bucket
from deltawire.errors import BadAnswer, DeltaWireError, EngineError, EngineUnavailable, EngineUnsupported, Quarantined
from deltawire.follow.follower import Follower
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import heartbeats
from deltawire.runlog.records import Position
from deltawire.trainers.trl import DeltaWeightTransfer
from deltawire.vllm.client import EngineClient

PASSWORD = "hunter2-7f3a"


@pytest.fixture(scope="module")
def run():
    with SmallRun() as run:
        run.publish(a=1)
        yield run


@pytest.fixture(scope="module")
def engine(run):
    """Two workers that stand on version 0 and have version 1 staged."""
    with StubEngine(*(Shard(run.versions[0], rank) for rank in range(2))) as engine:
        with EngineClient(engine.url) as client, Subscriber(open_bucket(run.url)) as subscriber:
            client.init(run.url)
            client.join(subscriber)
            client.stage(run.url, 1)
            await_staging()
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with EngineClient(engine.url) as client:
        yield client


@pytest.fixture(scope="module")
def subscriber(run):
    with Subscriber(open_bucket(run.url)) as subscriber:
        yield subscriber


def wrong_values(value: Any) -> Iterator[Any]:
    """A JSON value with one thing in it that should be otherwise: gone, null, of another type, or too much."""
    yield from (wrong for wrong in (None, [], {}, "text", -1, 1.5, True, [None], {"": 0}) if wrong != value)
    if isinstance(value, dict):
        for key in value:
            if key == "nonce":
                continue
            rest = {name: kept for name, kept in value.items() if name != key}
            yield rest
            yield from ({**rest, key: wrong} for wrong in wrong_values(value[key]))
    elif isinstance(value, list):
        yield [*value, *value]
        for wrong in wrong_values(value[0]) if value else ():
            yield [wrong, *value[1:]]


def wrong_bodies(body: Any) -> Iterator[bytes]:
    """The bytes of an answer, as a server that is not right might send them."""
    right = json.dumps(body).encode()
    yield from (b"", b"\xff\xfe", b"<html>sign in</html>", b"[" * 100_000, right[:-1], right[: len(right) // 2])
    for wrong in wrong_values(body):
        yield json.dumps(wrong).encode()


CALLS = {
    "status": ("/collective_rpc", lambda client, run, subscriber: client.status()),
    "join": ("/collective_rpc", lambda client, run, subscriber: client.join(subscriber)),
    "stage": ("/collective_rpc", lambda client, run, subscriber: client.stage(run.url, 1)),
    "staged": ("/collective_rpc", lambda client, run, reader: client.require_staged(reader, reader.latest())),
    "audit": ("/collective_rpc", lambda client, run, subscriber: client.audit()),
    "placement": ("/collective_rpc", lambda client, run, subscriber: client.placement()),
    "revert": ("/collective_rpc", lambda client, run, subscriber: client.revert()),
    "init": ("/init_weight_transfer_engine", lambda client, run, subscriber: client.init(run.url)),
    "pause": ("/pause", lambda client, run, subscriber: client.pause("keep", clear_cache=True)),
    "resume": ("/resume", lambda client, run, subscriber: client.resume()),
    "is_paused": ("/is_paused", lambda client, run, subscriber: client.is_paused()),
    "label": ("/update_weight_version", lambda client, run, subscriber: client.label("x")),
    "weight_version": ("/weight_info", lambda client, run, subscriber: client.weight_version()),
    "models": ("/v1/models", lambda client, run, subscriber: client.models()),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_whatever_comes_back_is_an_answer_or_a_typed_error(run, engine, client, subscriber, call):
    path, ask = CALLS[call]
    engine.adapters = {"policy@1": "/somewhere"}
    asked: list[dict[str, Any]] = []
    seen: list[Any] = []

    def right(request: dict[str, Any]) -> tuple[int, Any]:
        asked.append(request)
        seen.append(engine.do(path, request))
        return seen[-1]

    engine.faults[path] = right
    ask(client, run, subscriber)
    await_staging()
    # Of several questions: of staged's the one about what is held, of audit's the one about what was found.
    which = len(seen) - 1 if call in ("staged", "audit") else 0
    kinds: dict[type, int] = {}
    for body in wrong_bodies(seen[which][1]):
        count = iter(range(100))

        def wrong(request: dict[str, Any], body: bytes = body, count: Iterator[int] = count) -> tuple[int, Any]:
            meant = request.get("method") == "deltawire_result" if call == "audit" else next(count) == which
            if not meant:
                return engine.do(path, request)
            return 200, body.replace(_nonce(asked[which]), _nonce(request)) if _nonce(request) else body

        engine.faults[path] = wrong
        try:
            ask(client, run, subscriber)
        except DeltaWireError as error:
            kinds[type(error)] = kinds.get(type(error), 0) + 1
            assert not isinstance(error, EngineUnavailable), (body, error)
        await_staging()
    engine.faults.clear()
    assert kinds[Quarantined if path == "/collective_rpc" else BadAnswer] >= 6
    assert BadAnswer in kinds


def _nonce(request: dict[str, Any]) -> bytes:
    arguments = request.get("args")
    return json.loads(arguments[0])["nonce"].encode() if arguments else b""


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/is_paused", {"is_paused": None}, r"/is_paused got no answer .*\$\.is_paused.*'\{.is_paused.: null\}'"),
        ("/weight_info", ["x"], r"/weight_info got no answer .*Expected `object`"),
        ("/resume", b"<html>", r"/resume got no answer .*it was '<html>'"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_reported_with_what_came_and_followed_on(run, path, body, says):
    problems: list[Exception] = []
    with StubEngine(run.model(1)) as engine, EngineClient(engine.url) as client:
        engine.paused = True
        engine.fail(path, 200, body)
        call = {"/is_paused": client.is_paused, "/weight_info": client.weight_version, "/resume": client.resume}[path]
        with pytest.raises(BadAnswer, match=says):
            call()
        with Follower(run.url, EngineClient(engine.url), on_problem=problems.append, poll=0.01) as follower:
            thread = threading.Thread(target=follower.run, daemon=True)
            thread.start()
            until(lambda: problems, unless=lambda: not thread.is_alive())
            engine.faults.clear()
            until(lambda: engine.weight_version == str(run.publisher.position), unless=lambda: not thread.is_alive())
        thread.join(PATIENCE)
    assert [type(problem) for problem in problems] == [BadAnswer]


class Closing:
    """A server that answers each connection's first request with `status`, and closes at its second without a word, as
    uvicorn does when the two cross. `asked` are the requests that arrived, with their place on their connection."""

    def __init__(self, status: int) -> None:
        self._status = status
        self.asked: list[tuple[str, int]] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(PATIENCE)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        body = b'{"is_paused": false, "error": {"message": "as planned"}}'
        with connection, connection.makefile("rb") as lines:
            for place in range(2):
                first = lines.readline().decode().split()
                if not first:
                    return
                length = 0
                while line := lines.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                lines.read(length)
                self.asked.append((first[1], place))
                if place == 0:
                    connection.sendall(
                        b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (self._status, len(body)) + body
                    )


@contextmanager
def closing(status: int) -> Iterator[tuple[Closing, EngineClient]]:
    server = Closing(status)
    try:
        with EngineClient(server.url) as client:
            yield server, client
    finally:
        server.close()


def test_a_connection_that_brought_a_500_is_not_used_again():
    with closing(500) as (server, client):
        for _ in range(3):
            with pytest.raises(EngineError, match=r"answered 500: .*as planned"):
                client.start()
        assert server.asked == [("/start_weight_update", 0)] * 3


def test_what_may_be_asked_twice_is_when_the_connection_ended_under_it():
    with closing(200) as (server, client):
        assert client.is_paused() is False
        assert client.is_paused() is False
        client.resume()
        again = [("/is_paused", 0), ("/is_paused", 1), ("/is_paused", 0), ("/resume", 1), ("/resume", 0)]
        assert server.asked == again


def test_what_must_not_be_done_twice_is_not_and_the_error_says_so():
    with closing(200) as (server, client):
        client.resume()
        with pytest.raises(EngineUnavailable, match="broke off before it answered /update_weights"):
            client.update("memory://x", Position("run", 1, "0" * 64))
        assert server.asked == [("/resume", 0), ("/update_weights", 1)]


def with_password(url: str) -> str:
    return url.replace("http://", f"http://someone:{PASSWORD}@")


def test_a_name_and_password_in_the_address_are_sent_and_told_nobody(run, caplog):
    with StubEngine(run.model()) as engine, caplog.at_level(logging.DEBUG):
        with Follower(run.url, EngineClient(with_password(engine.url))) as follower:
            follower.step()
            login = base64.b64encode(f"someone:{PASSWORD}".encode()).decode()
            assert engine.headers[-1]["Authorization"] == f"Basic {login}"
            engine.fail("/is_paused", 500)
            with pytest.raises(EngineError) as failed:
                follower.step()
            engine.stop()
            with pytest.raises(EngineUnavailable) as gone:
                follower.step()
            follower.beat(error=str(gone.value))
        replica = Follower(run.url, EngineClient(engine.url)).replica
    said = "".join("".join(traceback.format_exception(error.value)) for error in (failed, gone)) + caplog.text
    assert PASSWORD not in said
    assert engine.url in str(gone.value)
    beats = {stat.key: beat for stat, beat in heartbeats.read_all(open_bucket(run.url))}
    assert f"replicas/{replica}.json" in beats
    assert PASSWORD not in repr(beats)


def test_every_error_about_an_address_leaves_its_password_out():
    for url in (f"ftp://someone:{PASSWORD}@host", f"http://someone:{PASSWORD}@", f"http://someone:{PASSWORD}@host:x"):
        with pytest.raises(EngineUnsupported) as refused:
            EngineClient(url)
        assert PASSWORD not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(TypeError) as misspelt:
        DeltaWeightTransfer("memory://x", with_password("http://127.0.0.1:1"))
    assert PASSWORD not in str(misspelt.value)
