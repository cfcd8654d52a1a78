"""What vLLM loads when it starts: little, and nothing that its own start-up stumbles over."""

import json
import subprocess
import sys

import pytest

from deltawire.vllm import versions


@pytest.mark.parametrize("module", ["deltawire", "deltawire.vllm", "deltawire.vllm.hooks", "deltawire.vllm.client"])
def test_numba_is_not_loaded_with_the_plugin(module):
    """vLLM's start-up looks into every module loaded so far, and llvmlite does not bear that."""
    code = f"import sys, {module}; print(*[name for name in ('numba', 'llvmlite', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def started():
    """What a process says of itself in which vLLM lacked a name when it loaded the plugin, and then had it."""
    code = """
import json, sys, warnings
import deltawire.vllm as plugin
import vllm
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.worker.gpu_worker import Worker
right = vllm.__version__, WeightTransferEngineFactory.__dict__["register_engine"]
vllm.__version__ = "0.99.0"
del WeightTransferEngineFactory.register_engine
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    plugin.register()
    plugin.register()
said = [str(one.message) for one in told if "deltawire" in str(one.message)]
left_alone = not hasattr(Worker, "deltawire_status")

vllm.__version__, WeightTransferEngineFactory.register_engine = right
plugin.register()
plugin.register()
assert "numba" not in sys.modules
import vllm._custom_ops as ops
from vllm.config import WeightTransferConfig
from vllm.model_executor.model_loader import base_loader, utils
assert "deltawire" in WeightTransferEngineFactory._registry
assert WeightTransferEngineFactory._registry["deltawire"]().__name__ == "DeltaWireEngine"
assert utils.process_weights_after_loading is base_loader.process_weights_after_loading
assert not hasattr(utils.process_weights_after_loading.__wrapped__, "__wrapped__")
assert all(hasattr(Worker, f"deltawire_{name}") for name in ("status", "holdings", "stage", "begin", "take"))
from deltawire.vllm import versions
print(json.dumps([said, left_alone, versions.missing({**versions.NAMES, **versions.NAMES_ON_CPU})]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
def test_the_engine_is_registered_once_however_often_vllm_asks_and_every_name_is_there(started):
    _, _, lacking = started
    assert lacking == []


@pytest.mark.vllm
def test_a_vllm_that_lacks_a_name_is_left_alone_and_the_name_is_told_once(started):
    (said,), left_alone, _ = started
    assert "0.99.0) lacks vllm.distributed.weight_transfer.factory.WeightTransferEngineFactory.register_engine:" in said
    assert left_alone


def test_a_name_that_is_not_there_is_named_and_a_module_stands_for_its_own():
    names = {"json": ("loads", "JSONDecoder.decode", "JSONDecoder.gone", "gone.further"), "json.gone": ("x",)}
    assert versions.missing(names) == ["json.JSONDecoder.gone", "json.gone.further", "json.gone"]


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0+cpu", "0.33.7rc1"])
def test_a_tested_version_with_every_name_is_passed_over(version):
    versions.warn(version, [])


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "dev", "0.3.0"])
def test_any_other_version_is_told_once(version, monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    with pytest.warns(UserWarning, match=r"tested with vLLM 0\.32 to 0\.33, and this one is") as told:
        versions.warn(version, [])
        versions.warn(version, [])
    assert len(told) == 1
