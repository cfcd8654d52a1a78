"""The gateway over real sockets: what is passed on, streams as they come, engines that are gone or busy."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from gateways import StubVLLM, gateway
from verbs import say
from waiting import until

from deltawire.errors import FormatError, Unavailable
from deltawire.gateway.engines import parse_engine
from deltawire.gateway.routing import Engine

PROMPT = {"model": "policy", "prompt": "once upon a time"}


@pytest.fixture
def pair() -> Iterator[tuple[StubVLLM, StubVLLM]]:
    """Two engines: one at version 3, one at version 5."""
    engines = StubVLLM(3), StubVLLM(5)
    yield engines
    for engine in engines:
        engine.stop()


@pytest.fixture
def door(pair) -> Iterator[str]:
    with gateway([Engine(engine.url) for engine in pair]) as url:
        yield url


def complete(url: str, body: dict = PROMPT, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    return httpx.post(url + path, json=body, headers=headers, timeout=60)


def test_a_request_gets_an_engine_that_is_new_enough_and_is_told_which(door, pair):
    for _ in range(4):
        answer = complete(door, **{"X-Min-Policy-Version": "4"})
        assert answer.json()["served"] == 5
        assert (answer.headers["X-Policy-Version"], answer.headers["X-Served-By"]) == ("ab:5", "1")
    assert not pair[0].asked


def test_a_request_waits_for_an_engine_that_becomes_new_enough(door, pair):
    timer = threading.Timer(0.2, lambda: setattr(pair[0], "version", 9))
    timer.start()
    assert complete(door, **{"X-Min-Policy-Version": "ab:9"}).json()["served"] == 9
    timer.join()


def raw(url: str, *lines: bytes, body: bytes = b"{}") -> bytes:
    """What a completion gets whose headers no client library would write."""
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("line", ["X-User: café €".encode(), b"X-User: caf\xe9", b"X-User: ada \t", b"X-User:"])
def test_headers_that_are_no_ascii_reach_an_engine_byte_for_byte(door, pair, line):
    assert raw(door, line).startswith(b"HTTP/1.1 200")
    seen = (pair[0].headers + pair[1].headers)[0]["x-user"]
    assert seen.encode("latin-1") == line.partition(b":")[2].strip()
    assert all(engine["ready"] for engine in httpx.get(f"{door}/health").json()["engines"])


def test_a_header_stands_in_an_answer_as_often_as_the_engine_wrote_it(door, pair):
    for engine in pair:
        engine.answers = {"Set-Cookie": "a=1", "set-cookie": "b=2", "X-Name": "caf\u00e9"}
    assert complete(door).headers.get_list("set-cookie") == ["a=1", "b=2"]


@pytest.mark.parametrize("floor", [b"9" * 5000, b"9" * 30, b"\xb2", b"-1", b"1e3"])
def test_a_floor_that_is_no_version_is_refused(door, floor):
    answer = raw(door, b"X-Min-Policy-Version: " + floor)
    assert answer.startswith(b"HTTP/1.1 400") and b"X-Min-Policy-Version is" in answer and len(answer) < 600


@pytest.mark.parametrize(
    "told",
    [
        {"ready": True, "served": {"run": "ab", "version": "7"}},
        {"ready": True, "served": {"run": "ab", "version": [1]}},
        {"ready": True, "served": {"run": "a\r\nX-Evil: 1", "version": 7}},
        {"ready": True, "served": 5},
        {"ready": "yes"},
        [],
        "deep",
    ],
)
def test_a_health_that_is_none_makes_an_engine_unready_until_it_is_one(pair, told):
    engine = pair[0]
    engine.told = b"[" * 100_000 if told == "deep" else json.dumps(told).encode()
    with gateway([Engine(engine.url, f"{engine.url}/follower")], patience=0.05) as url:
        assert complete(url, **{"X-Min-Policy-Version": "1"}).status_code == 503
        assert f"{engine.url}/follower" in httpx.get(f"{url}/health").json()["engines"][0]["reason"]
        engine.told = None
        until(lambda: httpx.get(f"{url}/health").json()["ready"])
        assert complete(url).headers["X-Policy-Version"] == "ab:3"


@pytest.mark.parametrize("text", ["", ",http://a/health", "http://", "http://a b", "http://[", "http://a:x", "a:8000"])
def test_what_is_no_address_of_an_engine_is_refused_at_once(text):
    with pytest.raises(FormatError, match="is no address: write http://host:8000"):
        parse_engine(text)


def test_a_version_that_nobody_serves_is_503_after_the_wait(pair):
    with gateway([Engine(engine.url) for engine in pair], patience=0.1) as url:
        answer = complete(url, **{"X-Min-Policy-Version": "6"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "version 5, and version 6 was asked for" in answer.json()["error"]["message"]
    assert not pair[0].asked and not pair[1].asked


def test_a_version_that_is_none_is_400(door):
    answer = complete(door, **{"X-Min-Policy-Version": "new"})
    assert answer.status_code == 400 and "12, or RUN:12" in answer.json()["error"]["message"]


def test_prompts_that_begin_alike_stay_with_one_engine(door, pair):
    for turn in range(6):
        complete(door, {"prompt": "You play Wordle. " * 60 + str(turn)})
    assert sorted(len(engine.asked) for engine in pair) == [0, 6]


def test_what_the_client_says_reaches_the_engine_and_its_own_version_comes_back(door, pair):
    for engine in pair:
        engine.answers = {"X-Policy-Version": "ab:4", "X-Other": "kept"}
    answer = complete(door, Authorization="Bearer secret")
    assert (answer.headers["X-Policy-Version"], answer.headers["X-Other"]) == ("ab:4", "kept")
    (headers,) = pair[0].headers + pair[1].headers
    assert headers["authorization" if "authorization" in headers else "Authorization"] == "Bearer secret"


def test_a_stream_comes_as_it_is_made(door, pair):
    for engine in pair:
        engine.pieces = [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n']
    with httpx.stream(
        "POST", door + "/v1/chat/completions", json={"messages": [{"role": "user"}], "stream": True}
    ) as answer:
        (engine,) = [engine for engine in pair if engine.asked]
        pieces = answer.iter_raw()
        for number in (1, 2):
            engine.go.release()
            assert json.loads(next(pieces).removeprefix(b"data: ")) == {"n": number}, "before the next is made"
        assert answer.headers["Content-Type"] == "text/event-stream"
    until(lambda: engine.go.release() or engine.gone.is_set())


def test_a_client_that_goes_before_the_answer_ends_its_request_at_the_engine(door, pair):
    host, port = door.removeprefix("http://").split(":")
    body = json.dumps({**PROMPT, "slow": True}).encode()
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        until(lambda: pair[0].asked or pair[1].asked)
    until(lambda: any(engine.gone.is_set() for engine in pair))
    until(lambda: not any(each["in_flight"] for each in httpx.get(door + "/health").json()["engines"]))


def test_an_engine_that_is_gone_or_busy_hands_its_request_to_the_other(door, pair):
    for lost in pair:
        other = pair[1 - pair.index(lost)]
        lost.status = 503
        for number in range(6):
            assert complete(door, {"prompt": f"prompt {number}"}).json()["served"] == other.version
        lost.status = 200
    pair[0].stop()
    for number in range(6):
        assert complete(door, {"prompt": f"prompt {number}"}).json()["served"] == 5


def test_engines_that_are_all_busy_for_a_moment_are_asked_again(door, pair):
    for engine in pair:
        engine.status = 503
    timer = threading.Timer(0.3, lambda: setattr(pair[1], "status", 200))
    timer.start()
    started = time.monotonic()
    assert complete(door).json()["served"] == 5
    assert time.monotonic() - started >= 0.2
    timer.join()


def test_an_engines_own_refusal_is_the_answer(door, pair):
    for engine in pair:
        engine.status = 401
    assert complete(door).status_code == 401


@pytest.mark.parametrize("answer", ["HTTP/1.1 999 Odd", "HTTP/1.1 600 Odd", "HTTP/1.1 200 OK\r\nX-Odd: a\x01b"])
def test_an_answer_that_http_does_not_have_is_502_and_names_what_is_wrong(answer):
    engine = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{engine.getsockname()[1]}"

    def answering() -> None:
        while True:
            try:
                connection, _ = engine.accept()
            except OSError:
                return
            with connection:
                if (asked := connection.recv(1 << 16)).startswith(b"POST"):
                    connection.sendall(f"{answer}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
                elif asked:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    thread = threading.Thread(target=answering, daemon=True)
    thread.start()
    with gateway([Engine(url)]) as door:
        for _ in range(2):
            refused = complete(door)
            assert refused.status_code == 502 and refused.json()["error"]["type"] == "service_unavailable"
            assert re.search(f"{url}: (it answers with status (999|600)|its header x-odd holds)", refused.text, re.I)
        assert httpx.get(f"{door}/health").json()["engines"][0]["in_flight"] == 0
    engine.shutdown(socket.SHUT_RDWR)
    engine.close()
    thread.join()


def test_what_changes_weights_is_not_passed_on(door, pair):
    for path in ("/update_weights", "/collective_rpc", "/pause", "/v1/load_lora_adapter"):
        assert complete(door, path=path).status_code == 404
    assert httpx.get(door + "/v1/completions").status_code == 405
    assert httpx.get(door + "/v1/models").json() == {"data": ["/v1/models"]}
    assert not pair[0].asked


def test_a_follower_says_whether_an_engine_is_ready(pair):
    with gateway([Engine(engine.url, engine.url + "/follower") for engine in pair]) as url:
        told = httpx.get(url + "/health")
        assert [(each["ready"], each["version"]) for each in told.json()["engines"]] == [(True, 3), (True, 5)]
        pair[1].healthy = False
        until(lambda: not httpx.get(url + "/health").json()["engines"][1]["ready"])
        assert {complete(url, {"prompt": f"{number}"}).json()["served"] for number in range(6)} == {3}
        pair[0].healthy = False
        until(lambda: httpx.get(url + "/health").status_code == 503)
        assert httpx.get(url + "/health").json()["engines"][0]["reason"] == "joining"


def test_an_engine_that_serves_no_version_yet_is_used_where_none_is_asked_for():
    engine = StubVLLM(None)
    try:
        with gateway([Engine(engine.url)], patience=0.05) as url:
            assert complete(url).status_code == 200 and "X-Policy-Version" not in complete(url).headers
            assert complete(url, **{"X-Min-Policy-Version": "0"}).status_code == 503
    finally:
        engine.stop()


def test_the_verb_opens_the_door_and_ends_when_told(pair):
    named = [word for engine in pair for word in ("--engine", engine.url)]
    command = [sys.executable, "-m", "deltawire.cli", "gateway", *named, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            told = json.loads(process.stdout.readline())
            assert (told["event"], len(told["engines"])) == ("ready", 2)
            assert complete(told["url"], **{"X-Min-Policy-Version": "5"}).json()["served"] == 5
        finally:
            process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM), "uvicorn ends by the signal that it was sent"


def test_a_port_that_is_taken_and_an_engine_that_is_none_are_named(pair):
    port = pair[0].url.rpartition(":")[2]
    with pytest.raises(Unavailable, match="--port"):
        say("gateway", "--engine", pair[0].url, "--port", port)
    with pytest.raises(FormatError, match="no address"):
        say("gateway", DELTAWIRE_ENGINES="http://a:8000 b:8000")
