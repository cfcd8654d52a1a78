"""Rendered Spaces: complete folders whose Dockerfiles find what they copy, and commands the Hub's own client knows."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deltawire.demo.spaces import ROLES, Rendered, render, space_url
from deltawire.errors import AlreadyExists, BadUrl, BucketError

CHECKOUT = Path(__file__).parents[2]
HF = shutil.which("hf", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    return render(CHECKOUT, "Ada_L", tmp_path_factory.mktemp("spaces") / "out")


def steps_of(dockerfile: Path) -> list[list[str]]:
    """The instructions, each as words; those that span lines joined."""
    text = dockerfile.read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def command_of(dockerfile: Path) -> list[str]:
    """The words of CMD."""
    return next(json.loads(rest) for name, rest in steps_of(dockerfile) if name == "CMD")


def front_matter(readme: Path) -> dict[str, str]:
    _, block, _ = readme.read_text().split("---\n", 2)
    return dict(line.split(": ", 1) for line in block.splitlines())


@pytest.mark.parametrize("role", ROLES)
def test_a_space_runs_as_user_1000_on_the_port_its_card_names(rendered: Rendered, role: str) -> None:
    folder = rendered.folders[role]
    card, steps = front_matter(folder / "README.md"), steps_of(folder / "Dockerfile")
    assert card["sdk"] == "docker"
    assert [rest for name, rest in steps if name == "EXPOSE"] == [card["app_port"]] == ["7860"]
    names = [name for name, _ in steps]
    assert names[0] == "FROM" and names[-1] == "CMD"
    assert any("--uid 1000 user" in rest for name, rest in steps if name == "RUN")
    assert names.index("USER") < names.index("WORKDIR") < names.index("COPY")


@pytest.mark.parametrize("role", ROLES)
def test_a_dockerfile_copies_what_is_there_and_starts_a_script_it_copied(rendered: Rendered, role: str) -> None:
    folder = rendered.folders[role]
    copied = []
    for name, rest in steps_of(folder / "Dockerfile"):
        if name == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            assert all((folder / source).exists() for source in sources), sources
            copied += sources
            assert target == "./" or sources == [target]
    shell, script = command_of(folder / "Dockerfile")  # the Hub keeps no executable bit, so a shell is named
    assert shell == "bash" and (folder / script).is_file() and script.split("/")[0] in copied
    assert subprocess.run(["bash", "-n", str(folder / script)], check=False).returncode == 0


@pytest.mark.parametrize("role", ROLES)
def test_what_a_dockerfile_installs_are_extras_of_this_package(rendered: Rendered, role: str) -> None:
    import tomllib

    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    words = [word.strip("'") for name, rest in steps_of(rendered.folders[role] / "Dockerfile") for word in rest.split()]
    (own,) = [word for word in words if word.startswith(".[")]
    assert set(own[2:-1].split(",")) <= extras.keys()


def test_a_space_carries_the_code_and_no_scripts_of_the_others(rendered: Rendered) -> None:
    for role, folder in rendered.folders.items():
        assert (folder / "src/deltawire/publish/publisher.py").read_bytes() == (
            CHECKOUT / "src/deltawire/publish/publisher.py"
        ).read_bytes()
        assert [path.name for path in (folder / "examples/spaces").iterdir()] == [role]
        assert not list(folder.rglob("__pycache__"))


def test_the_trainer_is_told_where_the_others_answer(rendered: Rendered) -> None:
    (made,) = [line for line in rendered.commands if line.startswith("hf repos create Ada_L/deltawire-trainer ")]
    assert space_url("Ada_L", "vllm") == "https://ada-l-deltawire-vllm.hf.space"
    assert "--env ENGINE_URL=https://ada-l-deltawire-vllm.hf.space" in made
    assert "--env ENVIRONMENT_URL=https://ada-l-deltawire-environment.hf.space" in made
    assert "--env BUCKET=hf://buckets/Ada_L/wordle" in made
    assert "--secrets HF_TOKEN --secrets VLLM_API_KEY" in made  # their names: values stay in the caller's environment


@pytest.mark.skipif(HF is None, reason="the hf command is not beside this Python")
def test_every_command_is_one_that_the_installed_hf_knows(rendered: Rendered) -> None:
    assert len(rendered.commands) == 1 + 2 * len(ROLES)
    for line in [*rendered.commands, "hf upload a/b . . --no-such-option"]:
        words = shlex.split(line)
        done = subprocess.run([HF, *words[1:], "--help"], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 0) == ("--no-such-option" not in line), line + done.stderr


def test_a_folder_in_use_and_a_name_that_is_none_are_refused(rendered: Rendered, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists, match="--out"):
        render(CHECKOUT, "ada", rendered.folders["vllm"].parent)
    with pytest.raises(BadUrl, match="ada/lab"):
        render(CHECKOUT, "ada/lab", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command_prints_what_to_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deltawire.cli", "spaces", "render", "--user", "ada", "--out", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "hf buckets create ada/wordle --private --exist-ok"
    assert f"hf upload ada/deltawire-vllm {tmp_path / 's' / 'vllm'} . --type space" in done.stdout


def test_a_disk_that_fills_up_leaves_nothing_and_the_same_folder_can_be_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, really = [40], shutil.copyfile

    def fill(source: Path, target: Path, **options: bool) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fill)
        with pytest.raises(BucketError, match="No space left") as caught:
            render(CHECKOUT, "ada", tmp_path / "out")
    assert len(str(caught.value)) < 500
    assert list((tmp_path / "out").iterdir()) == []
    assert render(CHECKOUT, "ada", tmp_path / "out").folders["trainer"].is_dir()


def test_a_folder_that_cannot_be_made_is_named_and_one_with_a_space_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(BucketError, match=str(out)):
            render(CHECKOUT, "ada", out)
    rendered = render(CHECKOUT, "ada", tmp_path / "my spaces; rm")
    for role, line in zip(ROLES, [line for line in rendered.commands if line.startswith("hf upload")], strict=True):
        assert shlex.split(line)[3] == str(rendered.folders[role])
