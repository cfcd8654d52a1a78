"""Which weights made which token, asked of a stand-in for vLLM as each version is to be asked; a real one is asked in
tests/vllm/test_server.py."""

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vllm"))
import weight_versions

SPANS = [{"version": "run:1", "start": 0, "end": 2}, {"version": "run:2", "start": 2, "end": 3}]


class VLLM(BaseHTTPRequestHandler):
    """Says `version`, answers the first `pauses` requests 503, and every other with three tokens in two chunks."""

    version = "0.33.0"
    pauses = 0
    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    headers_told: dict[str, str] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"version": VLLM.version}))

    def do_POST(self) -> None:
        VLLM.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        if VLLM.pauses:
            VLLM.pauses -= 1
            self.answer(503, '{"error": {"message": "Generation is paused."}}')
            return
        chunks = [{"token_ids": [5, 6]}, {"token_ids": [7], "weight_versions": SPANS}]
        lines = [json.dumps({"choices": [chunk]}) for chunk in chunks]
        self.answer(200, "".join(f"data: {line}\n\n" for line in [*lines, '{"usage": {}}', "[DONE]"]))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        for name, value in VLLM.headers_told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(VLLM, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), VLLM) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("version", "path", "options"),
    [
        ("0.32.0", "/inference/v1/generate", {"token_ids": [1, 2]}),
        ("dev", "/inference/v1/generate", {"token_ids": [1, 2]}),
        ("0.33.0", "/v1/completions", {"prompt": [1, 2], "return_weight_versions": True, "return_token_ids": True}),
        ("1.0.0", "/v1/completions", {"prompt": [1, 2], "return_weight_versions": True, "return_token_ids": True}),
    ],
)
def test_each_vllm_is_asked_in_the_way_in_which_it_tells(
    engine: str, monkeypatch: pytest.MonkeyPatch, version: str, path: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(VLLM, "version", version)
    *_, last = weight_versions.generate(engine, [1, 2], 3)
    assert last["weight_versions"] == SPANS
    ((asked, body),) = VLLM.asked
    assert asked == path
    assert body.items() >= options.items()


def test_a_vllm_that_pauses_is_asked_again(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_versions, "ASK_AGAIN", 0.001)
    monkeypatch.setattr(VLLM, "pauses", 2)
    assert [chunk["token_ids"] for chunk in weight_versions.generate(engine, [1], 3)] == [[5, 6], [7]]
    assert len(VLLM.asked) == 3


def test_the_headers_of_a_whole_answer_are_told_where_there_are_any(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weight_versions.policy(engine, [1, 2], 3) == (None, None)
    told = {"X-Policy-Version": "run:1", "X-Policy-Version-Last": "run:2"}
    monkeypatch.setattr(VLLM, "headers_told", told)
    assert weight_versions.policy(engine, [1, 2], 3) == ("run:1", "run:2")
    monkeypatch.setattr(sys, "argv", ["weight_versions.py", "--engine", engine, "--headers"])
    weight_versions.main()
    assert capsys.readouterr().out == "run:1 run:2\n"
