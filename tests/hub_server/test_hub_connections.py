"""Clients that are slow, silent or endless lose their connection, and shut nobody else out."""

import asyncio
import json
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest
from hub_client import ask, run_client
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState
from waiting import until

from deltawire.hub_server import Bounds, HubProcess, HubServer
from deltawire.hub_server.connections import Connection

SHORT = Bounds(header_seconds=0.4, stall_seconds=0.6)


class Talk(NamedTuple):
    """A connection that a test drives byte by byte."""

    socket: socket.socket

    def say(self, data: bytes) -> bool:
        """Send; False once the server has answered or ended the connection."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return not self.hears()

    def hears(self) -> bool:
        """Whether the server has said something, or nothing can come from it any more."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def answer(self) -> bytes:
        """One answer with a JSON object."""
        data = b""
        while not data.endswith(b"}"):
            data += self.socket.recv(1 << 16)
        return data

    def heard(self) -> bytes:
        """All that the server says until it ends the connection."""
        data = b""
        with suppress(ConnectionError):
            while piece := self.socket.recv(1 << 20):
                data += piece
        return data


@contextmanager
def talking(url: str, first: bytes = b"", *, receive_bytes: int | None = None) -> Iterator[Talk]:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        connection.sendall(first)
        yield Talk(connection)


def answers(url: str) -> bool:
    return ask(url, "GET", "/api/whoami-v2").status == 200


def post(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: hub\r\nContent-Length: {length}\r\n\r\n".encode()


def drip(talk: Talk, data: bytes, beside: Callable[[], bool]) -> int:
    """Send a byte now and then until the server ends it; how many went. What is done beside it must go well."""
    for sent, byte in enumerate(data):
        assert beside()
        if not talk.say(bytes([byte])):
            return sent
        time.sleep(0.02)
    return len(data)


def test_a_header_sent_byte_by_byte_is_ended_and_the_client_beside_it_is_answered(tmp_path: Path) -> None:
    with HubServer(tmp_path, bounds=SHORT) as hub, talking(hub.url) as slow:
        request = b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\nX: " + b"x" * 500
        assert 1 <= drip(slow, request, lambda: answers(hub.url)) < 200
        assert slow.heard().startswith(b"HTTP/1.1 408 ")
        with talking(hub.url) as silent:
            assert silent.heard().startswith(b"HTTP/1.1 408 ")


def test_the_header_of_a_second_request_has_its_own_deadline(tmp_path: Path) -> None:
    whole = b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\n\r\n"
    with HubServer(tmp_path, bounds=SHORT) as hub, talking(hub.url, whole) as slow:
        assert slow.answer().startswith(b"HTTP/1.1 200 ")
        time.sleep(2 * SHORT.header_seconds)  # idle between two requests is no offence
        slow.socket.sendall(whole)
        assert slow.answer().startswith(b"HTTP/1.1 200 ")
        slow.socket.sendall(whole[:-2])
        assert slow.heard().startswith(b"HTTP/1.1 408 ")


def test_a_header_without_end_is_refused_long_before_it_fills_memory(tmp_path: Path) -> None:
    with HubServer(tmp_path) as hub, talking(hub.url, b"GET / HTTP/1.1\r\nX: ") as endless:
        sent = 0
        while sent < 64 << 20 and endless.say(b"x" * (1 << 16)):
            sent += 1 << 16
        assert sent < 16 << 20  # what lies in the kernel's buffers
        assert answers(hub.url)


def test_silent_clients_give_way_when_all_places_are_taken(tmp_path: Path) -> None:
    bounds = Bounds(connections=4, header_seconds=60)
    with HubServer(tmp_path, bounds=bounds) as hub, ExitStack() as stack:
        silent = [stack.enter_context(talking(hub.url, b"GET / HT")) for _ in range(20)]
        for _ in range(8):
            assert answers(hub.url)
        until(lambda: sum(not talk.hears() for talk in silent) <= 4)


def test_a_client_that_stalls_in_its_body_gives_way_too(tmp_path: Path) -> None:
    bounds = Bounds(connections=2, header_seconds=0.2, stall_seconds=60)
    with HubServer(tmp_path, bounds=bounds) as hub, ExitStack() as stack:
        stalled = [stack.enter_context(talking(hub.url, post("/v1/telemetry", 1000))) for _ in range(2)]
        until(lambda: ask(hub.url, "GET", "/api/whoami-v2").status == 200)
        assert sum(talk.hears() for talk in stalled) >= 1


def test_when_all_places_are_at_work_the_next_client_is_told_to_come_later(tmp_path: Path) -> None:
    with HubServer(tmp_path, bounds=Bounds(connections=2)) as hub:
        assert ask(hub.url, "POST", "/api/buckets/me/fed", b"{}").status == 200
        listen = b"GET /api/buckets/me/fed/events HTTP/1.1\r\nHost: hub\r\n\r\n"
        with talking(hub.url, listen) as one, talking(hub.url, listen) as other:
            assert one.socket.recv(5) == other.socket.recv(5) == b"HTTP/"
            assert ask(hub.url, "GET", "/api/whoami-v2").status == 503
        until(lambda: ask(hub.url, "GET", "/api/whoami-v2").status == 200)


def test_a_body_that_stalls_is_ended(tmp_path: Path) -> None:
    with HubServer(tmp_path, bounds=SHORT) as hub, talking(hub.url, post("/v1/telemetry", 1000) + b"x") as stalled:
        assert stalled.heard() == b""
        assert answers(hub.url)


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def connection() -> Connection:
    """One that is not on the network, with the usual bounds."""
    config = Config(read_all, lifespan="off", ws="none", log_config=None)
    config.load()
    made = Connection(bounds=Bounds(), places=9, config=config, server_state=ServerState(), app_state={})
    made.connection_made(MagicMock(is_closing=lambda: False, get_extra_info=lambda name: None))
    return made


def test_a_body_may_take_hours_if_it_keeps_coming_and_two_minutes_if_it_drips() -> None:
    async def minutes(each: int) -> int:
        """For how many minutes a body is listened to of which so much arrives each."""
        made = connection()
        now = made.loop.time()
        made.data_received(post("/", 1 << 30))
        for minute in range(120):
            made.data_received(b"x" * each)
            await asyncio.sleep(0)  # the application reads it
            if made.overdue(now + 60 * minute):
                return minute
        return 120

    assert asyncio.run(minutes(64 << 10)) == 120
    assert asyncio.run(minutes(1)) == 3


def test_the_time_for_a_header_is_not_begun_again_by_each_byte() -> None:
    async def seconds() -> float:
        made = connection()
        now = made.loop.time()
        for second in range(100):
            made.data_received(b"GET / HTTP/1.1\r\n"[second % 16 : second % 16 + 1] if second < 16 else b"X")
            if made.overdue(now + second):
                return second
        return 100

    assert asyncio.run(seconds()) == 21


def test_a_body_without_end_is_refused_and_not_listened_to_for_long(tmp_path: Path) -> None:
    start = b"POST /v1/telemetry HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with HubServer(tmp_path, bounds=SHORT) as hub, talking(hub.url, start) as endless:
        said = b""
        endless.socket.settimeout(0.01)
        deadline = time.monotonic() + 20
        with suppress(ConnectionError):
            while time.monotonic() < deadline:
                with suppress(TimeoutError):
                    endless.socket.sendall(chunk)
                    time.sleep(0.002)
                with suppress(TimeoutError):
                    said += endless.socket.recv(1 << 16)
        assert time.monotonic() < deadline - 10
        assert said.startswith(b"HTTP/1.1 413 ")
        assert answers(hub.url)


def test_an_answer_that_nobody_takes_is_dropped(tmp_path: Path) -> None:
    size = 24 << 20
    (tmp_path / "file").write_bytes(os.urandom(size))
    script = "api.create_bucket('me/b')\napi.batch_bucket_files('me/b', add=[(sys.argv[1], 'f')])\n"
    read = b"GET /buckets/me/b/resolve/f HTTP/1.1\r\nHost: hub\r\n\r\n"
    with HubServer(tmp_path / "root", bounds=Bounds(stall_seconds=1)) as hub:
        run_client(tmp_path, hub.url, script, str(tmp_path / "file"))
        with talking(hub.url, read, receive_bytes=8192) as idle:
            assert len(ask(hub.url, "GET", "/buckets/me/b/resolve/f").body) == size
            until(lambda: not hub._server.server_state.connections)
            assert len(idle.heard()) < size


@contextmanager
def few_files(number: int) -> Iterator[None]:
    """Processes started here may open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_at_256_files_more_slow_clients_than_that_shut_nobody_out(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with few_files(256):
            hub = stack.enter_context(HubProcess(tmp_path / "root", log=tmp_path / "log"))
        for _ in range(8):
            for _ in range(50):
                stack.enter_context(talking(hub.url, b"POST /api/buckets/me/b HTTP/1.1\r\nX: "))
            assert answers(hub.url)
        add = "add=[(b'1' * 9999, str(number)) for number in range(9)]"
        run_client(tmp_path, hub.url, f"api.create_bucket('me/b')\napi.batch_bucket_files('me/b', {add})\n")
        listed = ask(hub.url, "GET", "/api/buckets/me/b/tree").body
        assert len(json.loads(listed)) == 9
    assert b"out of system resource" not in (tmp_path / "log").read_bytes()


@pytest.mark.parametrize(("files", "places"), [(64, 8), (256, 64), (1024, 352), (1 << 20, 1024)])
def test_places_follow_from_the_files_a_process_may_open(
    files: int, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    assert Bounds().places() == places
    assert Bounds(connections=7).places() == 7
