"""A vLLM server's control endpoints, spoken as typed calls with typed errors."""

import json
import os
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from deltawire import errors
from deltawire.errors import EngineError, EngineUnavailable, EngineUnsupported, Quarantined
from deltawire.manifests import Position

try:
    import httpx
except ImportError:
    raise ImportError("speaking to vLLM needs httpx: pip install 'deltawire[follow]'") from None

TIMEOUT = httpx.Timeout(120.0, connect=5.0)
"""seconds; a call waits for the scheduler's current step, and for a first compile"""
LIMITS = httpx.Limits(keepalive_expiry=2.0)
"""seconds an idle connection is used again: fewer than the 5 after which vLLM closes it"""
DIRECT = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}
"""hosts that are never reached through a proxy, whatever the environment says"""


class WorkerStatus(msgspec.Struct, frozen=True):
    """What a worker says of itself.

    `attached` is the bucket it stands on, `run` that bucket's run; `position` what it serves, None while that is no
    committed version; `error` its newest failure, None after a success; `session_open` whether a weight update was
    started and not finished.
    """

    attached: str | None
    run: str | None
    position: Position | None
    staging: bool
    staged: dict[str, Any] | None
    applied: dict[str, Any] | None
    quarantined: bool
    session_open: bool
    error: dict[str, str] | None


class AuditReport(msgspec.Struct, frozen=True):
    """Digests recomputed from a server's live memory, and the names that differ from the version it says it serves."""

    position: Position | None
    digests: dict[str, str]
    mismatched: list[str]

    @property
    def tensors(self) -> int:
        """Tensors digested."""
        return len(self.digests)


class EngineClient:
    """One vLLM server. Its API key, when it has one, is read from VLLM_API_KEY.

    Every call raises EngineUnavailable when nobody answers, EngineUnsupported when the server lacks what it takes, and
    Quarantined when an answer is not to the question asked.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, limits=LIMITS, mounts=DIRECT)

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def status(self) -> WorkerStatus:
        """Where the worker stands."""
        return msgspec.convert(self._ask("status", {}), WorkerStatus)

    def init(self, bucket: str, trusted: Iterable[str] = ()) -> WorkerStatus:
        """Attach the worker to a bucket: placement is probed and live weights digested. Its outcome is the status."""
        info = {"bucket": bucket, **({"trusted": sorted(trusted)} if trusted else {})}
        self._post("/init_weight_transfer_engine", {"init_info": info})
        return self.status()

    def stage(self, bucket: str, version: int) -> bool:
        """Ask the worker to stage a version on its own thread; False while it is staging another. The outcome is in
        `status`."""
        return bool(self._ask("stage", {"bucket": bucket, "version": version})["accepted"])

    def audit(self, bucket: str | None = None) -> AuditReport:
        """Recompute every digest from live memory, and compare with the version the worker says it serves, or (when it
        serves none) with the newest. `bucket` compares with another bucket than the one followed. Raises what kept the
        worker from it."""
        return msgspec.convert(self._ask("audit", {"bucket": bucket} if bucket else {}), AuditReport)

    def placement(self) -> dict[str, list[dict[str, Any]]]:
        """Where each checkpoint tensor lives in the worker's parameters."""
        boxes: dict[str, list[dict[str, Any]]] = self._ask("placement", {})["placement"]
        return boxes

    def start(self) -> None:
        """Open a weight update session."""
        self._post("/start_weight_update", {})

    def update(self, bucket: str, version: int) -> None:
        """Commit what is staged. HTTP 200 says nothing: read `status` for the outcome."""
        self._post("/update_weights", {"update_info": {"bucket": bucket, "version": version}})

    def finish(self, weight_version: str | None) -> None:
        """Close the session; with a version the server reports it from now on."""
        self._post("/finish_weight_update", {"weight_version": weight_version} if weight_version else {})

    def pause(self, *, clear_cache: bool) -> None:
        """Hold generation; requests in flight are kept."""
        self._post("/pause", None, params={"mode": "keep", "clear_cache": str(clear_cache).lower()})

    def resume(self) -> None:
        """Let generation go on."""
        self._post("/resume", None)

    def is_paused(self) -> bool:
        """Whether generation is held."""
        return bool(self._send("GET", "/is_paused", None, {}).get("is_paused"))

    def label(self, weight_version: str) -> None:
        """Have the server report this version from now on; no weight moves."""
        self._post("/update_weight_version", {"new_version": weight_version})

    def weight_version(self) -> str:
        """What the server says it serves."""
        answer = self._send("GET", "/weight_info", None, {})
        return str(answer.get("weight_version"))

    def _ask(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """One worker method by /collective_rpc; its nonce must come back."""
        nonce = secrets.token_hex(8)
        body = {"method": f"deltawire_{method}", "args": [json.dumps({**request, "nonce": nonce})]}
        results = self._post("/collective_rpc", body).get("results") or [None]
        if len(results) != 1:
            raise EngineUnsupported(f"{self.url} runs {len(results)} workers; one worker per follower is proven so far")
        answer = results[0]
        if not isinstance(answer, dict) or answer.get("nonce") != nonce:
            raise Quarantined(f"{self.url} answered another question than was asked: restart it")
        if refused := answer.get("refused"):
            raise named_error(refused)
        return answer

    def _post(self, path: str, body: Any, params: dict[str, str] | None = None) -> dict[str, Any]:
        return self._send("POST", path, body, params or {})

    def _send(self, verb: str, path: str, body: Any, params: dict[str, str]) -> dict[str, Any]:
        try:
            response = self._http.request(verb, path, json=body, params=params)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"{self.url} does not answer ({error}): is vLLM running there?") from None
        if response.status_code in (401, 403):
            raise EngineUnsupported(f"{self.url}{path} refused us ({response.status_code}): set VLLM_API_KEY")
        if response.status_code == 404:
            raise EngineUnsupported(f"{self.url} has no {path}: start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1")
        if response.status_code >= 400:
            raise self._refusal(path, response)
        try:
            answer = response.json()
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}

    def _refusal(self, path: str, response: httpx.Response) -> EngineError:
        text = response.text[:300]
        if path == "/collective_rpc" or "not configured" in text:
            return EngineUnsupported(
                f"{self.url} has no deltawire engine ({response.status_code}): install deltawire beside vLLM and start "
                """it with --weight-transfer-config '{"backend":"deltawire"}'"""
            )
        return EngineError(f"{self.url}{path} answered {response.status_code}: {text}")


def named_error(record: dict[str, Any]) -> errors.DeltaWireError:
    """The typed error a worker recorded, made again on this side."""
    kind = getattr(errors, str(record.get("kind")), None)
    message = str(record.get("message", "the worker gave no reason"))
    if isinstance(kind, type) and issubclass(kind, errors.DeltaWireError):
        return kind(message)
    return EngineError(f"{record.get('kind')}: {message}")
