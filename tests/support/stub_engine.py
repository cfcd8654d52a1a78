"""A stand-in for vLLM's control endpoints over a small model, which can be made to fail at any of them.

For faults alone: what vLLM itself does with weights is tested on vLLM itself.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from runs import PATIENCE
from small import Fused

from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.vllm.hooks import worker_method

Answer = tuple[int, Any]


class StubEngine:
    """`faults[path]` answers instead of the endpoint while it is there; `calls` are the paths asked, in order."""

    def __init__(self, *models: Fused) -> None:
        self.workers = [LiveWorker(model, loading=AfterLoading(), workers=len(models)) for model in models]
        self._seats = [
            SimpleNamespace(weight_transfer_engine=_Held(self, rank), _weight_update_active=False, rank=rank)
            for rank in range(len(models))
        ]
        self.paused = self._stopped = False
        self.weight_version = "default"
        self.adapters: dict[str, str] = {}
        self.faults: dict[str, Callable[[dict[str, Any]], Answer]] = {}
        self.calls: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.queries: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "StubEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer nobody from now on."""
        self._stopped = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)

    @property
    def worker(self) -> LiveWorker:
        """The first one; another may be put in its place."""
        return self.workers[0]

    @worker.setter
    def worker(self, worker: LiveWorker) -> None:
        self.workers[0] = worker

    @property
    def session_open(self) -> bool:
        """Whether a weight update was started and not finished."""
        return bool(self._seats[0]._weight_update_active)

    @session_open.setter
    def session_open(self, is_open: bool) -> None:
        for seat in self._seats:
            seat._weight_update_active = is_open

    def fail(self, path: str, status: int, body: Any = None, *, after: bool = False) -> None:
        """Answer this from now on; with `after`, do what was asked first."""

        def fault(request: dict[str, Any]) -> Answer:
            if after:
                self.do(path, request)
            return status, body or {"error": {"message": "as planned"}}

        self.faults[path] = fault

    def do(self, path: str, request: dict[str, Any]) -> Answer:
        """What vLLM does at this path."""
        if path == "/collective_rpc":
            method = worker_method(request["method"].removeprefix("deltawire_"))
            return 200, {"results": [method(seat, *request["args"]) for seat in self._seats]}
        if path == "/init_weight_transfer_engine":
            for worker in self.workers:
                worker.begin_attach(request["init_info"])
        elif path == "/start_weight_update":
            with self.worker_methods("start"):
                if self.session_open:
                    raise RuntimeError("a weight update is already active")
                self.session_open = True
        elif path == "/update_weights":
            with self.worker_methods("update"):
                if not self.session_open:
                    raise RuntimeError("no matching start_weight_update")
                for worker in self.workers:
                    worker.update(request["update_info"])
        elif path == "/finish_weight_update":
            with self.worker_methods("finish"):
                if not self.session_open:
                    raise RuntimeError("no matching start_weight_update")
                self.session_open = False
                for worker in self.workers:
                    worker.confirm()
            self.weight_version = request.get("weight_version") or self.weight_version
        elif path == "/update_weight_version":
            self.weight_version = request["new_version"]
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/is_paused":
            return 200, {"is_paused": self.paused}
        elif path == "/v1/models":
            return 200, {"data": [{"id": name, "root": folder} for name, folder in self.adapters.items()]}
        elif path == "/v1/load_lora_adapter":
            self.adapters[request["lora_name"]] = request["lora_path"]
        elif path == "/v1/unload_lora_adapter":
            del self.adapters[request["lora_name"]]
        elif path == "/weight_info":
            return 200, {"weight_version": self.weight_version}
        else:
            return 404, {"detail": "Not Found"}
        return 200, {}

    @contextmanager
    def worker_methods(self, doing: str) -> Iterator[None]:
        """What a worker's method raises is an outcome of the worker's, as the plugin has it."""
        with ExitStack() as stack:
            for worker in self.workers:
                stack.enter_context(worker.recording(doing, clear=False))
            yield

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer waits 40 ms for its second half

            def do_POST(self) -> None:
                _, _, path, query, _ = urlsplit(self.path)
                stub.queries[path] = query
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                stub.calls.append(path)
                stub.headers.append(dict(self.headers))
                self.close_connection = stub._stopped
                if stub._stopped:
                    return
                status, answer = stub.faults.get(path, lambda request: stub.do(path, request))(
                    json.loads(body or b"{}")
                )
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *arguments: object) -> None: ...

        return Handler


class _Held:
    """A worker's weight transfer engine: its LiveWorker, whichever that is now."""

    def __init__(self, stub: StubEngine, rank: int) -> None:
        self._stub, self._rank = stub, rank

    @property
    def worker(self) -> LiveWorker:
        return self._stub.workers[self._rank]
