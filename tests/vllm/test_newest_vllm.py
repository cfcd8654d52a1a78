"""The newest vLLM this is tested with, of which there is no build for CPU: its own Python source, out of PyPI's wheel
(320 MB), imported over the compiled parts of the build that is installed. No server is started."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from programs import program

from deltawire.vllm.versions import TESTED

ROOM = 2 << 30
"""bytes of disk that the wheel and its source need, with some to spare"""
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put before all others on Python's path."""
    folder = tmp_path_factory.mktemp("vllm")
    installed = importlib.util.find_spec("vllm")
    if installed is None or installed.origin is None:
        pytest.skip("no vLLM is installed whose compiled parts could be used")
    if shutil.disk_usage(folder).free < ROOM:
        pytest.skip(f"{folder} has no room for vLLM's wheel")
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={TESTED[1]}.*"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        pytest.skip(f"the wheel of vLLM {TESTED[1]} cannot be had: {done.stderr.strip()[-300:]}")
    (wheel,) = folder.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder, [name for name in packed.namelist() if name.endswith((".py", "/METADATA"))])
    wheel.unlink()
    for library in Path(installed.origin).parent.glob("*.so"):
        (folder / "vllm" / library.name).symlink_to(library)
    (about,) = folder.glob("vllm-*.dist-info")
    version = about.name.removeprefix("vllm-").removesuffix(".dist-info")
    text = (about / "METADATA").read_text().replace(f"Version: {version}", f"Version: {version}+cpu", 1)
    shutil.rmtree(about)
    (folder / f"vllm-{version}+cpu.dist-info").mkdir()
    (folder / f"vllm-{version}+cpu.dist-info" / "METADATA").write_text(text)
    return folder


def facts(source: Path, which: str) -> Any:
    """What `newest_vllm_facts` says in a Python that finds this vLLM."""
    path = os.pathsep.join([str(source), str(Path(__file__).parents[1] / "live"), *sys.path])
    command = [sys.executable, program("newest_vllm_facts"), which]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_name_is_there_and_the_plugin_installs_itself_without_a_word(source):
    version, said, lacking, abstract = facts(source, "plugin")
    assert version.startswith(TESTED[1] + ".")
    assert (said, lacking, abstract) == ([], [], [])


def test_every_endpoint_that_a_follower_asks_is_there(source):
    routes = facts(source, "endpoints")
    offered = {(method, path) for path, methods in routes for method in methods}
    asked = {
        ("GET", "/is_paused"), ("GET", "/version"), ("GET", "/weight_info"), ("POST", "/collective_rpc"),
        ("POST", "/finish_weight_update"), ("POST", "/init_weight_transfer_engine"), ("POST", "/pause"),
        ("POST", "/resume"), ("POST", "/start_weight_update"), ("POST", "/update_weight_version"),
        ("POST", "/update_weights"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    }  # fmt: skip
    assert asked - offered == set()


def test_completions_and_chat_tell_which_weights_made_which_token_when_asked(source):
    assert facts(source, "weight_versions") == [True] * 4


def test_steps_that_use_its_own_replace_parameter_are_done_again_alike(source):
    kept = facts(source, "replaced_parameters")
    assert kept == [True]  # the parameter is the same after a transform, whatever became of its shape and dtype
