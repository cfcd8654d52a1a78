"""What the plugin changes in vLLM, once per process: the engine's name, CPU packing off, a watch on post-load steps,
and four methods on the worker class that `/collective_rpc` reaches."""

import functools
import json
from typing import Any

import torch

from deltawire.errors import EngineUnsupported
from deltawire.vllm.live import changes_between, tensors_of
from deltawire.vllm.memory import fingerprint

ENGINE = "deltawire"
TRANSFORMED = "_deltawire_transformed"
"""the attribute of a loaded model that names parameters changed after loading"""
NOT_CHOSEN = """start this vLLM server with --weight-transfer-config '{"backend":"deltawire"}'"""
_INSTALLED = "_deltawire_installed"


def install() -> None:
    """Change this process's vLLM; doing it twice changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(Worker, _INSTALLED, False):
        return
    setattr(Worker, _INSTALLED, True)
    WeightTransferEngineFactory.register_engine(ENGINE, "deltawire.vllm.engine", "DeltaWireEngine")
    if current_platform.is_cpu():
        _keep_linear_weights_unpacked()
    _watch_post_load_steps()
    for name in ("status", "stage", "placement", "audit"):
        setattr(Worker, f"deltawire_{name}", _worker_method(name))


def _keep_linear_weights_unpacked() -> None:
    """oneDNN and SGL copy a linear layer's weight into a packed one and read only that: every later update would answer
    HTTP 200 and change nothing. vLLM has no switch for either."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils

    ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *shape_and_dtype: False


def _watch_post_load_steps() -> None:
    """Record what `process_weights_after_loading` changes, before anyone asks. What it changes is not as loaded."""
    from vllm.model_executor.model_loader import base_loader, utils

    original = utils.process_weights_after_loading

    @functools.wraps(original)
    def watched(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = tensors_of(model)
        known = {name: fingerprint(tensor) for name, tensor in before.items()}
        result = original(model, *args, **kwargs)
        object.__setattr__(model, TRANSFORMED, changes_between(before, tensors_of(model), known))
        return result

    utils.process_weights_after_loading = watched
    base_loader.process_weights_after_loading = watched


def _worker_method(name: str) -> Any:
    def method(worker: Any, request: str = "{}") -> dict[str, Any]:
        """JSON in, a dict out; never raises: with several workers one that did would leave later answers off by one."""
        nonce = None
        try:
            asked = json.loads(request)
            nonce = asked.get("nonce")
            replica = getattr(worker.weight_transfer_engine, "replica", None)
            answer = getattr(replica, f"answer_{name}", None)
            if answer is None:
                raise EngineUnsupported(NOT_CHOSEN)
            session_open = bool(worker._weight_update_active)
            return {**answer(asked), "nonce": nonce, "rank": worker.rank, "session_open": session_open}
        except Exception as error:
            return {"nonce": nonce, "refused": {"kind": type(error).__name__, "message": str(error)}}

    method.__name__ = f"deltawire_{name}"
    return method
