"""A vLLM server's control endpoints."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deltawire.errors import EngineError, EngineUnavailable, EngineUnsupported
from deltawire.manifests import Position
from deltawire.vllm.protocol import Engine, PauseMode, WorkerStatus

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


class EngineClient(Engine):
    """One vLLM server, over HTTP. Its API key, when it has one, is read from VLLM_API_KEY.

    Raises EngineUnsupported for what is not the address of a server."""

    def __init__(self, url: str, *, timeout: httpx.Timeout | float = TIMEOUT) -> None:
        self.url = url.rstrip("/")
        if not _is_address(self.url):
            given = "what was given" if "@" in url else repr(url)  # a password may stand before an "@"
            raise EngineUnsupported(f"{given} is not the address of a server, as http://127.0.0.1:8000")
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=LIMITS, mounts=DIRECT)

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call_workers(self, method: str, argument: str) -> list[Any]:
        return list(self._post("/collective_rpc", {"method": method, "args": [argument]}).get("results") or [])

    def init(self, bucket: str, trusted: Iterable[str] = ()) -> WorkerStatus:
        info = {"bucket": bucket, **({"trusted": sorted(trusted)} if trusted else {})}
        self._post("/init_weight_transfer_engine", {"init_info": info})
        return self.status()

    def start(self) -> None:
        self._post("/start_weight_update", {})

    def update(self, bucket: str, target: Position) -> None:
        info = {"bucket": bucket, "version": target.version, "root": target.root}
        self._post("/update_weights", {"update_info": info})

    def finish(self, weight_version: str | None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version} if weight_version else {})

    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        self._post("/pause", None, params={"mode": mode, "clear_cache": str(clear_cache).lower()})

    def resume(self) -> None:
        self._post("/resume", None)

    def is_paused(self) -> bool:
        return bool(self._send("GET", "/is_paused", None, {}).get("is_paused"))

    def label(self, weight_version: str) -> None:
        self._post("/update_weight_version", {"new_version": weight_version})

    def weight_version(self) -> str:
        answer = self._send("GET", "/weight_info", None, {})
        return str(answer.get("weight_version"))

    def models(self) -> dict[str, str]:
        """Every model and adapter that a request may name, in order of loading, and the folder it was loaded from."""
        cards = self._send("GET", "/v1/models", None, {}).get("data") or []
        return {str(card.get("id")): str(card.get("root")) for card in cards}

    def load_adapter(self, name: str, folder: Path) -> None:
        """Have the server answer requests that name an adapter with the one in a folder of its host."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Requests that name an adapter are refused from now on; those in flight go on."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: Any, params: dict[str, str] | None = None) -> dict[str, Any]:
        return self._send("POST", path, body, params or {})

    def _send(self, verb: str, path: str, body: Any, params: dict[str, str]) -> dict[str, Any]:
        try:
            response = self._http.request(verb, path, json=body, params=params)
        except httpx.HTTPError as error:
            raise EngineUnavailable(f"{self.url} does not answer ({error}): is vLLM running there?") from None
        if response.status_code in (401, 403):
            raise EngineUnsupported(f"{self.url}{path} refused us ({response.status_code}): set VLLM_API_KEY")
        if response.status_code == 404 and "NotFoundError" not in response.text:  # else it is an endpoint that says no
            setting = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" if "lora" in path else "VLLM_SERVER_DEV_MODE=1"
            raise EngineUnsupported(f"{self.url} has no {path}: start vLLM 0.32 or newer with {setting}")
        if response.status_code >= 400:
            raise self._refusal(path, response)
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def _refusal(self, path: str, response: httpx.Response) -> EngineError:
        text = response.text[:300]
        if "LoRA is not enabled" in text:
            return EngineUnsupported(f"{self.url} takes no adapters: start vLLM with --enable-lora")
        if path == "/collective_rpc" or "not configured" in text:
            return EngineUnsupported(
                f"{self.url} has no deltawire engine ({response.status_code}): install deltawire beside vLLM and start "
                """it with --weight-transfer-config '{"backend":"deltawire"}'"""
            )
        return EngineError(f"{self.url}{path} answered {response.status_code}: {text}")


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)
