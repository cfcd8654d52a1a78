"""A vLLM server's control endpoints."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deltawire.buckets.addresses import is_loopback, parts_of
from deltawire.buckets.proxies import proxy_note
from deltawire.errors import BadAnswer, EngineError, EngineUnavailable, EngineUnsupported, Quarantined
from deltawire.follow.engine import Engine, PauseMode
from deltawire.runlog.records import Position
from deltawire.vllm.answers import Done, Models, Paused, Results, WeightInfo, decoded

try:
    import httpx
except ImportError:
    raise ImportError("speaking to vLLM needs httpx: pip install 'deltawire[follow]'") from None

T = TypeVar("T")
TIMEOUT = httpx.Timeout(120.0, connect=5.0)
"""seconds; a call waits for the scheduler's current pass, and for a first compile"""
LIMITS = httpx.Limits(keepalive_expiry=2.0)
"""seconds an idle connection is used again: fewer than the 5 after which vLLM closes it"""
BROKEN_OFF = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""a connection that ended under a request: an idle one that vLLM closed, or vLLM going away"""


class EngineClient(Engine):
    """One vLLM server, over HTTP. Its API key, when it has one, is read from VLLM_API_KEY.

    A name and password in the address ("http://name:password@host") are sent, and are not in `url` or any error.
    Raises EngineUnsupported for what is not the address of a server."""

    software = "vLLM"

    def __init__(self, url: str, *, timeout: httpx.Timeout | float = TIMEOUT) -> None:
        self.url, login = _address(url)
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # This host is never reached through a proxy, whatever the environment says.
        direct = {f"all://{httpx.URL(self.url).netloc.decode()}": None} if is_loopback(self.url) else {}
        self._http = httpx.Client(
            base_url=self.url, auth=login, headers=headers, timeout=timeout, limits=LIMITS, mounts=direct
        )

    def __enter__(self) -> "EngineClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def call_workers(self, method: str, argument: str) -> list[Any]:
        body = self._send("POST", "/collective_rpc", {"method": method, "args": [argument]})
        try:
            return decoded(body, Results, method).results
        except BadAnswer as error:  # without a nonce it is an answer to another question
            raise Quarantined(f"{self.url} answered another question than was asked: {error}") from None

    def begin_init(
        self, bucket: str, trusted: Iterable[str] = (), settings: Mapping[str, str] = {}, base: Path | None = None
    ) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": self.attaching(bucket, trusted, settings, base)})

    def start(self) -> None:
        self._post("/start_weight_update", {}, again=False)

    def update(self, bucket: str, target: Position) -> None:
        self._post("/update_weights", {"update_info": self.updating(bucket, target)}, again=False)

    def finish(self, weight_version: str | None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version} if weight_version else {}, again=False)

    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        self._post("/pause", None, params={"mode": mode, "clear_cache": str(clear_cache).lower()})

    def resume(self) -> None:
        self._post("/resume", None)

    def is_paused(self) -> bool:
        return self._get("/is_paused", Paused).is_paused

    def label(self, weight_version: str) -> None:
        self._post("/update_weight_version", {"new_version": weight_version})

    def weight_version(self) -> str:
        return self._get("/weight_info", WeightInfo).weight_version

    def models(self) -> dict[str, str]:
        """Every model and adapter that a request may name, in order of loading, and the folder it was loaded from."""
        return {card.id: str(card.root) for card in self._get("/v1/models", Models).data}

    def load_adapter(self, name: str, folder: Path) -> None:
        """Have the server answer requests that name an adapter with the one in a folder of its host."""
        body = {"lora_name": name, "lora_path": str(folder)}
        self._send("POST", "/v1/load_lora_adapter", body, again=False)  # it answers a sentence

    def unload_adapter(self, name: str) -> None:
        """Requests that name an adapter are refused from now on; those in flight go on."""
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, again=False)

    def _get(self, path: str, kind: type[T]) -> T:
        return decoded(self._send("GET", path), kind, f"{self.url}{path}")

    def _post(self, path: str, body: Any, *, params: dict[str, str] | None = None, again: bool = True) -> None:
        decoded(self._send("POST", path, body, params, again=again), Done, f"{self.url}{path}")

    def _send(
        self, verb: str, path: str, body: Any = None, params: dict[str, str] | None = None, *, again: bool = True
    ) -> bytes:
        """The body of the answer. With `again`, what may be asked twice is, if the connection ended under it."""
        try:
            status, answer = self._once(verb, path, body, params)
        except BROKEN_OFF as error:
            if again:
                return self._send(verb, path, body, params, again=False)
            raise EngineUnavailable(
                f"{self.url} broke off before it answered {path} ({error or 'no reason'})"
            ) from None
        except httpx.HTTPError as error:
            through = proxy_note(self.url)
            raise EngineUnavailable(f"{self.url} does not answer ({error}){through}: is vLLM running there?") from None
        if status >= 400:
            raise self._refusal(path, status, answer.decode(errors="replace"))
        return answer

    def _once(self, verb: str, path: str, body: Any, params: dict[str, str] | None) -> tuple[int, bytes]:
        """Status and body of one request. A connection that brought 500 or above is not used again, for the server may
        be closing it. Leaving such an answer before its end drops the connection from the pool."""
        with self._http.stream(verb, path, json=body, params=params) as response:
            if response.status_code >= 500:
                return response.status_code, next(response.iter_bytes(), b"")
            return response.status_code, response.read()

    def _refusal(self, path: str, status: int, answer: str) -> EngineError:
        if status in (401, 403):
            return EngineUnsupported(f"{self.url}{path} refused us ({status}): set VLLM_API_KEY")
        if status == 404 and "NotFoundError" not in answer:  # else it is an endpoint that says no
            setting = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" if "lora" in path else "VLLM_SERVER_DEV_MODE=1"
            return EngineUnsupported(f"{self.url} has no {path}: start vLLM 0.32 or newer with {setting}")
        text = answer[:300]
        if "LoRA is not enabled" in text:
            return EngineUnsupported(f"{self.url} takes no adapters: start vLLM with --enable-lora")
        if path == "/collective_rpc" or "not configured" in text:
            return EngineUnsupported(
                f"{self.url} has no deltawire engine ({status}): install deltawire beside vLLM and start "
                """it with --weight-transfer-config '{"backend":"deltawire"}'"""
            )
        return EngineError(f"{self.url}{path} answered {status}: {text}")


def _address(url: str) -> tuple[str, tuple[str, str] | None]:
    """The address of a server as it may be shown, and the name and password that were in it."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parts_of(url).hostname:
        given = "what was given" if "@" in url else repr(url)  # a password may stand before an "@"
        raise EngineUnsupported(f"{given} is not the address of a server, as http://127.0.0.1:8000")
    if not parsed.userinfo:
        return url.rstrip("/"), None
    shown = parsed.copy_with(username=None, password=None)
    return str(shown).rstrip("/"), (parsed.username, parsed.password)
