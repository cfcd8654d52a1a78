"""The gate before vLLM: five routes, a key, and nothing else of what vLLM opens in dev mode."""

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "spaces" / "vllm"))
from gate import ROUTES, build_app

KEY = "a key of many characters"
NAMED = {"Authorization": f"Bearer {KEY}"}


class Open(BaseHTTPRequestHandler):
    """Like vLLM in dev mode on every path: does what it is asked, and tells what that was; 503 `pauses` times first."""

    pauses = 0

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        told = json.dumps({"path": self.path, "body": body, "key": self.headers["Authorization"]}).encode()
        self.send_response(503 if Open.pauses else 200)
        Open.pauses = max(0, Open.pauses - 1)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_GET = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Open) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def gate(engine: str) -> Iterator[TestClient]:
    with TestClient(build_app(engine, f"{engine}/follower", KEY)) as client:
        yield client


@pytest.mark.parametrize("path", ROUTES)
def test_a_route_passes_with_the_key_and_is_closed_without(gate: TestClient, path: str) -> None:
    passed = gate.request(ROUTES[path], path, headers=NAMED, content=b'{"prompt": [1]}')
    assert passed.status_code == 200
    assert passed.json() == {"path": path, "body": '{"prompt": [1]}', "key": NAMED["Authorization"]}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        assert gate.request(ROUTES[path], path, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/collective_rpc", "/update_weights", "/init_weight_transfer_engine", "/pause", "/resume", "/weight_checker",
        "/sleep", "/server_info", "/v1/../collective_rpc", "/v1/completions/../../pause", "/v1%2f..%2fpause",
        "//collective_rpc", "/weight_info/", "/health/../pause", "/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_dev_mode_opens_is_not_there_not_even_with_the_key(gate: TestClient, path: str, method: str) -> None:
    answer = gate.request(method, path, headers=NAMED, follow_redirects=False)
    assert answer.status_code in (404, 405, 307)  # 307: to the same route without its slash
    assert "path" not in answer.text


def test_health_is_the_followers_for_everybody_and_503_while_there_is_none(gate: TestClient, engine: str) -> None:
    assert gate.get("/health").json()["path"] == "/follower"
    with TestClient(build_app(engine, "http://127.0.0.1:9/health", KEY)) as early:
        assert early.get("/health").status_code == 503
    with TestClient(build_app("http://127.0.0.1:9", engine, KEY)) as early:
        assert early.get("/weight_info", headers=NAMED).status_code == 503


def test_a_vllm_that_pauses_is_asked_again_and_not_for_ever(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gate.ASK_AGAIN", 0.001)
    monkeypatch.setattr(Open, "pauses", 3)
    with TestClient(build_app(engine, engine, KEY)) as gate:
        assert gate.post("/v1/completions", headers=NAMED, json={}).status_code == 200
    monkeypatch.setattr(Open, "pauses", 3)
    with TestClient(build_app(engine, engine, KEY, patience=0.0)) as gate:
        assert gate.post("/v1/completions", headers=NAMED, json={}).status_code == 503
