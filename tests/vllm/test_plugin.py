"""What vLLM loads when it starts: little, and nothing that its own start-up stumbles over."""

import json
import subprocess
import sys

import pytest
from programs import program

from deltawire.vllm import versions


@pytest.mark.parametrize("module", ["deltawire", "deltawire.vllm", "deltawire.vllm.hooks", "deltawire.vllm.client"])
def test_numba_is_not_loaded_with_the_plugin(module):
    """vLLM's start-up looks into every module loaded so far, and llvmlite does not bear that."""
    code = f"import sys, {module}; print(*[name for name in ('numba', 'llvmlite', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def started():
    """What a process says of itself in which vLLM lacked a name when it loaded the plugin, and then had it."""
    command = [sys.executable, program("loads_plugin_twice")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
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
    monkeypatch.setattr(versions, "warned", set())
    with pytest.warns(UserWarning, match=r"tested with vLLM 0\.32 to 0\.33, and this one is") as told:
        versions.warn(version, [])
        versions.warn(version, [])
    assert len(told) == 1
