"""Which vLLM this is tested with, and the names of vLLM that it uses. A warning says once that the version is
another, or that a name is not there."""

import importlib
import re
import warnings
from collections.abc import Mapping
from functools import reduce

TESTED = ("0.32", "0.33")
"""the oldest and the newest vLLM that this is tested with"""
NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.config": ("WeightTransferConfig", "get_current_vllm_config_or_none"),
    "vllm.distributed.weight_transfer.base": (
        "WeightTransferEngine.finish_weight_update",
        "WeightTransferEngine.init_transfer_engine",
        "WeightTransferEngine.parse_init_info",
        "WeightTransferEngine.receive_weights",
        "WeightTransferEngine.shutdown",
        "WeightTransferEngine.start_weight_update",
        "WeightTransferEngine.update_weights",
        "WeightTransferInitInfo",
        "WeightTransferUpdateInfo",
    ),
    "vllm.distributed.weight_transfer.factory": ("WeightTransferEngineFactory.register_engine",),
    "vllm.model_executor.model_loader.base_loader": ("process_weights_after_loading",),
    "vllm.model_executor.model_loader.utils": ("process_weights_after_loading",),
    "vllm.platforms": ("current_platform",),
    "vllm.v1.worker.gpu_worker": (
        "Worker.finish_weight_update",
        "Worker.init_weight_transfer_engine",
        "Worker.start_weight_update",
        "Worker.update_weights",
    ),
}
"""without one of these the plugin changes nothing of vLLM"""
NAMES_ON_CPU: Mapping[str, tuple[str, ...]] = {
    "vllm._custom_ops": ("_supports_onednn",),
    "vllm.model_executor.layers.utils": ("check_cpu_sgl_kernel",),
}
"""the switches of what vLLM packs on CPU"""
NAMES_OF_MIDDLEWARE: Mapping[str, tuple[str, ...]] = {"vllm.v1.engine.async_llm": ("AsyncLLM.get_weight_version",)}
"""what `middleware` asks; without it no header is added"""
warned: set[str] = set()
"""what was said in this process"""


def missing(names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Which of these are not there, as `module.name`; a module that cannot be imported stands for its names."""
    lacking = []
    for module, inside in names.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            lacking.append(module)
            continue
        for name in inside:
            try:
                reduce(getattr, name.split("."), found)
            except AttributeError:
                lacking.append(f"{module}.{name}")
    return lacking


def is_tested(version: str) -> bool:
    """Whether a version of vLLM, "0.33.1" or "0.33.0rc2", is of the tested range."""
    oldest, newest = (tuple(map(int, tested.split("."))) for tested in TESTED)
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and oldest <= tuple(map(int, found.groups())) <= newest


def warn(version: str, lacking: list[str]) -> None:
    """Say once that a version is not one of those tested, or lacks names that are used."""
    if is_tested(version) and not lacking:
        return
    known = f"deltawire is tested with vLLM {TESTED[0]} to {TESTED[1]}"
    what = (
        f"and this one ({version}) lacks {', '.join(lacking)}: weights cannot be followed, or not everywhere"
        if lacking
        else f"and this one is {version}; every name of it that deltawire uses is there"
    )
    if (said := f"{known}, {what}") not in warned:
        warned.add(said)
        warnings.warn(said, stacklevel=2)
