"""The demo's last word: does vLLM's memory, patched a hundred times, hold the trainer's weights bit for bit? Does the
bucket? Would a server started on them today?"""

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import msgspec

from deltawire.demo.summary import Audit, Traffic
from deltawire.format.checkpoint import Checkpoint
from deltawire.vllm.client import EngineClient
from deltawire.weights.digest import digest

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""loopback is never reached through a proxy, whatever the environment says"""


class _Checksums(msgspec.Struct):
    checksums: dict[str, str]


def audit(version: int, trainer: Path, engine: str, materialized: Path, fresh: str) -> Audit:
    """Compare independent computations, tensor by tensor. `trainer` is the file of digests that the trainer made of its
    own weights. Those of the server `engine` are recomputed from live memory now, and `materialized` is a checkpoint
    read now. vLLM's own checksums of its parameters are compared between `engine` and `fresh`, a server that was
    started on the materialized checkpoint and never updated.

    Raises EngineError or OSError when a server does not answer."""
    own = {name: int(value, 16) for name, value in json.loads(trainer.read_text()).items()}
    with EngineClient(engine) as client:
        live = {name: int(value, 16) for name, value in client.audit().digests.items()}
    weights = Checkpoint(materialized)
    stored = digest(weights)
    patched = checksums(engine)
    return Audit(
        version=version,
        tensors=len(own),
        vllm_differs=compare(own, live),
        bucket_differs=compare(own, stored),
        checksums=len(patched),
        fresh_server_differs=compare(patched, checksums(fresh)),
    )


def compare(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """The tensors whose digests differ, or that only one side has; sorted."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def checksums(engine: str) -> dict[str, str]:
    """vLLM's own SHA-256 of each of its parameters, from /weight_checker."""
    body = json.dumps({"action": "checksum"}).encode()
    request = urllib.request.Request(f"{engine}/weight_checker", body, {"Content-Type": "application/json"})
    with _DIRECT.open(request, timeout=60) as answer:
        return msgspec.json.decode(answer.read(), type=_Checksums).checksums


def traffic(hub: str) -> Traffic:
    """What the bucket server counted so far."""
    with _DIRECT.open(f"{hub}/_deltawire/stats", timeout=10) as answer:
        return msgspec.json.decode(answer.read(), type=Traffic)


def is_healthy(engine: str) -> bool:
    """Whether vLLM answers /health."""
    try:
        with _DIRECT.open(f"{engine}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
