"""What is ready to deploy: each file is accepted by its own tool, and what it starts is there, with these options."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import compose_spec
import kubernetes_validate
import numpy as np
import pytest
import yaml
from typer.main import get_command
from verbs import say

import deltawire as dw
from deltawire.cli import app
from deltawire.read import host_cache
from deltawire.vllm.versions import is_tested

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = (DEPLOY / "compose.yaml").read_text()
PAGE = (Path(__file__).parents[2] / "docs" / "DEPLOY.md").read_text()


def variables() -> set[str]:
    """The environment that some option of some verb is read from, or every reader's cache."""
    verbs = get_command(app).commands.values()
    return {host_cache.FOLDER, host_cache.LIMIT} | {
        parameter.envvar for verb in verbs for parameter in verb.params if getattr(parameter, "envvar", None)
    }


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_accepts_a_unit(unit, tmp_path):
    """With its programs and its user put where this machine has some: systemd asks for both."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("there is no systemd-analyze here")
    for each in UNITS:
        text = each.read_text().replace("/opt/deltawire/bin/", f"{tmp_path}/").replace("User=deltawire", "User=root")
        (tmp_path / each.name).write_text(text)
    for program in ("vllm", "deltawire"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    done = subprocess.run(
        [tool, "verify", "--man=no", tmp_path / unit.name], capture_output=True, text=True, check=False
    )
    mine = [line for line in done.stderr.splitlines() if "deltawire" in line]
    assert (done.returncode, mine) == (0, [])


def test_systemd_refuses_a_unit_with_a_mistake(tmp_path):
    """So that the test above can fail."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("there is no systemd-analyze here")
    (tmp_path / "wrong.service").write_text("[Service]\nExecStart=/no/such/program\nRestart=sometimes\n")
    done = _verify(tool, tmp_path / "wrong.service")
    assert done.returncode != 0 or "sometimes" in done.stderr


def _verify(tool: str, unit: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, "verify", "--man=no", unit], capture_output=True, text=True, check=False)


def test_compose_accepts_its_file():
    services = compose_spec.PyCompose.from_yaml(COMPOSE).service_names()
    assert sorted(services) == ["follower", "gateway", "vllm"]
    with pytest.raises(Exception, match="network_mood"):
        compose_spec.PyCompose.from_yaml(COMPOSE.replace("network_mode:", "network_mood:"))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_kubernetes_accepts_a_manifest(manifest):
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_refuses_a_manifest_with_a_mistake():
    wrong = {**MANIFESTS[0], "spec": {**MANIFESTS[0]["spec"], "port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_every_option_and_variable_that_is_set_is_one_that_deltawire_has():
    known = variables()
    for path in sorted(DEPLOY.iterdir()):
        text = path.read_text()
        assert {*re.findall(r"DELTAWIRE_[A-Z_]+", text)} <= known, path.name
    for verb in ("follow", "gateway"):
        offered = say(verb, "--help")
        for path in (*UNITS, DEPLOY / "compose.yaml", DEPLOY / "kubernetes.yaml"):
            for line in path.read_text().splitlines():
                if f"deltawire {verb}" in line or f"deltawire, {verb}" in line:
                    assert all(option in offered for option in re.findall(r"--[a-z-]+", line)), (path.name, line)


def test_the_image_is_made_of_what_is_there(tmp_path):
    """No image is built here, for that takes a daemon and the vLLM image. What its COPY lines copy builds a wheel."""
    lines = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line[:1] not in ("", "#")]
    assert [line[0] for line in lines] == ["FROM", "COPY", "COPY", "RUN"]
    (_, image), *copies, run = lines
    assert is_tested(image.partition(":v")[2]), "a vLLM that this is tested with"
    for _, *sources, target in copies:
        there = tmp_path / target.lstrip("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                there.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, there)
    where, extras = re.fullmatch(r"'(/\w+)\[([\w,]+)\]'", run[-1]).groups()
    assert run[1:-1] == ["pip", "install", "--no-cache-dir"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "out"]
    done = subprocess.run([*build, tmp_path / where[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        told = packed.read(next(name for name in packed.namelist() if name.endswith("/METADATA"))).decode()
        assert "deltawire/vllm/middleware.py" in packed.namelist()
    assert {*extras.split(",")} <= {*re.findall(r"^Provides-Extra: (\w+)$", told, re.M)}


def test_vllm_is_started_the_same_everywhere():
    """On loopback, with our engine and middleware, which is there."""
    from deltawire.vllm.middleware import PolicyVersion

    named = f"{PolicyVersion.__module__}.{PolicyVersion.__qualname__}"
    for path in (DEPLOY / "deltawire-vllm.service", DEPLOY / "compose.yaml", DEPLOY / "kubernetes.yaml"):
        text = path.read_text().replace(" ", "").replace("=", "")
        assert "--host127.0.0.1" in text and '{"backend":"deltawire"}' in text and f"--middleware{named}" in text


def test_the_page_names_every_file_and_variable():
    assert all(path.name in PAGE for path in DEPLOY.iterdir())
    told = set(re.findall(r"DELTAWIRE_[A-Z_]+", PAGE))
    assert told <= variables() and {"DELTAWIRE_BUCKET", "DELTAWIRE_TRUST", "DELTAWIRE_ENGINES"} <= told


@pytest.mark.parametrize("line", re.findall(r"^deltawire ([a-z].*)$", PAGE, re.M))
def test_a_command_of_the_page_has_its_options(line):
    verb, *words = line.split()
    offered = say(verb, "--help")
    assert words and all(word in offered for word in words if word.startswith("--"))


def test_variables_that_a_unit_leaves_empty_are_as_good_as_not_set(tmp_path):
    with dw.Publisher(dw.open_bucket(tmp_path.as_uri(), create=True)) as publisher:
        publisher.publish({"w": np.ones(3, np.float16)})
    left_empty = {
        line.split("=")[0] for line in (DEPLOY / "deltawire.env").read_text().splitlines() if line.endswith("=")
    }
    assert "DELTAWIRE_TRUST" in left_empty
    assert "anchor" in say("log", DELTAWIRE_BUCKET=str(tmp_path), **dict.fromkeys(left_empty, ""))
