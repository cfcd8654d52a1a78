"""What is released: a wheel and an sdist with the whole package, which work where their core alone is installed."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import deltawire

REPOSITORY = Path(__file__).parents[1]
PROGRAM = REPOSITORY / "tests" / "support" / "core_paths.py"
HEAVY = ("numba", "llvmlite", "torch", "cryptography", "vllm", "huggingface_hub")
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")
MOST = 105 * 10**6
"""bytes of files, not byte-compiled, that a core install may have; 94 million were measured, and its libraries grow"""


def call(*command: object, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that was built from it; no index is asked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = call("git", "ls-files", "-z", *SOURCES, cwd=REPOSITORY).stdout.split("\0")
    for name in filter(None, files):
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


def test_the_wheel_holds_every_module_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"deltawire-{deltawire.__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(REPOSITORY / "src").as_posix() for path in (REPOSITORY / "src").rglob("*.py")}
    assert names == modules | {"deltawire/py.typed", "deltawire/fleet/page.html"}


def test_the_sdist_holds_what_a_wheel_is_made_of(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "src/deltawire/py.typed"}


def environment_of(folder: Path, what: str) -> Path:
    """A virtual environment with this installed; its Python. Skips where pip reaches no index."""
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--retries", "1"]
    command = [*install, "--constraint", "constraints.txt", what]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode and ("No matching distribution" in done.stderr or "Could not find a version" in done.stderr):
        pytest.skip("pip reaches no index here")
    assert done.returncode == 0, done.stderr
    return python


def work_with(python: Path, folder: Path) -> tuple[dict, dict]:
    """What the installed command says of itself, and what a run published and followed came to."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = json.loads(call(python.with_name("deltawire"), "--version", "--json", env=clean, cwd=folder).stdout)
    return told, json.loads(call(python, PROGRAM, folder, env=clean, cwd=folder).stdout)


def test_the_wheel_alone_publishes_follows_and_verifies(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    python = environment_of(tmp_path / "venv", str(wheel))
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert [name for name in HEAVY if (packages / name).exists()] == []
    ours = [
        path for path in packages.iterdir() if path.name.partition("-")[0] not in ("pip", "setuptools", "pkg_resources")
    ]
    assert sum(path.stat().st_size for top in ours for path in top.rglob("*") if path.is_file()) < MOST
    told, run = work_with(python, tmp_path)
    assert (told["version"], told["loops"]) == (deltawire.__version__, "numpy")
    assert (run["followed"], run["verified"], run["loaded"]) == (True, 4, [])
    listed = call(python.with_name("deltawire"), "log", (tmp_path / "bucket").as_uri(), "--json").stdout
    assert len(listed.splitlines()) == 5


@pytest.mark.nightly
def test_the_sdist_with_its_light_extras_does_the_same_faster(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    python = environment_of(tmp_path / "venv", f"deltawire[fast,sign,server,follow,s3,hub] @ {sdist.as_uri()}")
    told, run = work_with(python, tmp_path)
    assert (told["loops"], run["loaded"]) == ("numba", ["numba"])
    call(python.with_name("deltawire"), "keygen", tmp_path / "key")
