"""What vLLM loads when it starts: little, and nothing that its own start-up stumbles over."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["deltawire", "deltawire.vllm", "deltawire.vllm.hooks", "deltawire.vllm.client"])
def test_numba_is_not_loaded_with_the_plugin(module):
    """vLLM's start-up looks into every module loaded so far, and llvmlite does not bear that."""
    code = f"import sys, {module}; print(*[name for name in ('numba', 'llvmlite', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


@pytest.mark.vllm
def test_the_engine_is_registered_once_however_often_vllm_asks():
    code = """
import deltawire.vllm as plugin
plugin.register()
plugin.register()
import sys
assert "numba" not in sys.modules
import vllm._custom_ops as ops
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import base_loader, utils
from vllm.v1.worker.gpu_worker import Worker
assert "deltawire" in WeightTransferEngineFactory._registry
assert WeightTransferEngineFactory._registry["deltawire"]().__name__ == "DeltaWireEngine"
assert utils.process_weights_after_loading is base_loader.process_weights_after_loading
assert not hasattr(utils.process_weights_after_loading.__wrapped__, "__wrapped__")
assert all(hasattr(Worker, f"deltawire_{name}") for name in ("status", "holdings", "stage", "audit"))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
