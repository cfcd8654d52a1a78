"""What the plugin changes in vLLM, once per process. It adds the engine's name and the worker's methods behind
`/collective_rpc`. Where that engine is chosen, it watches what happens to the weights after loading, and turns CPU
packing off."""

import functools
import os
from typing import Any

import torch

from deltawire.errors import EngineUnsupported
from deltawire.live.answers import Seat, respond
from deltawire.live.live_weights import watch_loading
from deltawire.live.rpc import PREFIX, VERBS
from deltawire.vllm import versions

ENGINE = "deltawire"
LOADING = "_deltawire_loading"
"""the attribute of a loaded model that holds what was changed of it after loading"""
PREPACK = "DELTAWIRE_PREPACK"
"""the environment variable that, when `keep`, leaves vLLM's packing of linear weights on CPU as it is"""
NOT_CHOSEN = """start vLLM with --weight-transfer-config '{"backend":"deltawire"}'"""
SESSION = ("start_weight_update", "update_weights", "finish_weight_update")
"""vLLM's own worker methods that raise when no session is open, or one is already"""
_INSTALLED = "_deltawire_installed"


def install() -> None:
    """Change this process's vLLM; doing it twice changes nothing. One that lacks a name we use is left as it is, with a
    warning that says which: vLLM may be serving something else."""
    import vllm

    lacking = versions.missing(versions.NAMES)
    versions.warn(vllm.__version__, lacking)
    if lacking:
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(Worker, _INSTALLED, False):
        return
    setattr(Worker, _INSTALLED, True)
    WeightTransferEngineFactory.register_engine(ENGINE, "deltawire.vllm.engine", "DeltaWireEngine")
    _watch_post_load()
    for name in SESSION:
        setattr(Worker, name, _kept_from_raising(getattr(Worker, name)))
    for verb in VERBS:
        setattr(Worker, PREFIX + verb, worker_method(verb))


def _watch_post_load() -> None:
    """See what `process_weights_after_loading` changes, before anyone asks: what it changes is not as loaded."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.model_loader import base_loader, utils

    original = utils.process_weights_after_loading

    @functools.wraps(original)
    def watched(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        config = get_current_vllm_config_or_none()
        chosen = getattr(getattr(config, "weight_transfer_config", None), "backend", None)
        if chosen != ENGINE:
            return original(model, *args, **kwargs)
        _ask_for_tiles()
        _keep_linear_weights_unpacked()
        result, loading = watch_loading(model, lambda: original(model, *args, **kwargs))
        object.__setattr__(model, LOADING, loading)
        return result

    utils.process_weights_after_loading = watched
    base_loader.process_weights_after_loading = watched


def _ask_for_tiles() -> None:
    """Linux gives a process AMX tiles only when asked. vLLM's attention on CPU uses them without asking, and dies of
    SIGILL where no other kernel asked before. So did vLLM 0.32 on Sapphire Rapids, with linear weights packed."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        torch.cpu._init_amx()  # False, and nothing happens, on a CPU without them


def _keep_linear_weights_unpacked() -> None:
    """On CPU oneDNN and SGL copy a linear layer's weight into a packed one and read only that. Without them weights are
    patched where they lie, which vLLM has no switch for. With DELTAWIRE_PREPACK=keep they stay, and what they hold is
    remade at each update. Kept so for vLLM's own reloads, which would pack some layers only."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    import vllm

    if current_platform.is_cpu() and os.environ.get(PREPACK) != "keep":
        versions.warn(vllm.__version__, versions.missing(versions.NAMES_ON_CPU))
        ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *shape_and_dtype: False


def _kept_from_raising(original: Any) -> Any:
    """With our engine, a session that another follower opened or ended is an outcome to be read from the status."""

    @functools.wraps(original)
    def method(worker: Any, *args: Any, **kwargs: Any) -> None:
        live = getattr(worker.weight_transfer_engine, "worker", None)
        if live is None:
            original(worker, *args, **kwargs)
            return
        with live.recording(original.__name__, clear=False):
            original(worker, *args, **kwargs)

    return method


def worker_method(verb: str) -> Any:
    """What vLLM's Worker does under a verb's name: JSON in, a dict out; it never raises."""

    def method(worker: Any, request: str = "{}") -> dict[str, Any]:
        return respond(verb, request, lambda: _seat_of(worker))

    method.__name__ = PREFIX + verb
    return method


def _seat_of(worker: Any) -> Seat:
    live = getattr(worker.weight_transfer_engine, "worker", None)
    if live is None:
        raise EngineUnsupported(NOT_CHOSEN)
    return Seat(live, worker.rank, bool(worker._weight_update_active))
