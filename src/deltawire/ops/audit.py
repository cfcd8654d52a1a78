"""The demo's last word: are the weights in vLLM's memory, and those in the bucket, the trainer's own, tensor by tensor?"""

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import msgspec

from deltawire.checkpoint import Checkpoint
from deltawire.digest import digest_bits
from deltawire.ops.summary import Audit, Traffic
from deltawire.vllm.client import EngineClient

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""loopback is never reached through a proxy, whatever the environment says"""


def audit(version: int, trainer: Path, engine: str, materialized: Path) -> Audit:
    """Compare three independent computations: `trainer` is the file of digests the trainer made of its own weights,
    those of `engine` are recomputed from live memory now, and `materialized` is a checkpoint whose bits are read now."""
    own = {name: int(value, 16) for name, value in json.loads(trainer.read_text()).items()}
    with EngineClient(engine) as client:
        live = {name: int(value, 16) for name, value in client.audit().digests.items()}
    weights = Checkpoint(materialized)
    stored = {name: digest_bits(weights[name].data) for name in weights}
    return Audit(
        version=version, tensors=len(own), vllm_differs=compare(own, live), bucket_differs=compare(own, stored)
    )


def compare(trainer: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    """The tensors whose digests differ, or that only one side has; sorted."""
    return sorted(name for name in trainer.keys() | other.keys() if trainer.get(name) != other.get(name))


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
