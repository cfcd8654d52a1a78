"""Three folders for three Spaces of one user, each a small checkout with a Dockerfile; and what commands start them.

Nothing is uploaded here: what a person runs is printed, and names secrets without holding them.
"""

import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deltawire.buckets.atomic import file_system_errors
from deltawire.errors import AlreadyExists, BadUrl, BucketError

ROLES = ("environment", "vllm", "trainer")
"""in the order in which they are started"""
SHARED = ("pyproject.toml", "constraints.txt", "LICENSE", "scripts", "src/deltawire", "examples/wordle")
"""what every Space carries of the checkout"""
CARD = ("README.md", "Dockerfile")
"""what a Space has at its root, and its template in its folder"""
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")


@dataclass(frozen=True, slots=True)
class Rendered:
    """The folders, by role, and the shell commands, in order."""

    folders: dict[str, Path]
    commands: list[str]


def render(checkout: Path, user: str, out: Path) -> Rendered:
    """Write a folder for each role under `out`, from `examples/spaces` of a checkout.

    Raises BadUrl for what cannot be a user of the Hub, AlreadyExists for an `out` that holds anything, OutOfSpace and
    other BucketErrors; then `out` holds nothing, and can be named again.
    """
    if not _USER.fullmatch(user):
        raise BadUrl(f"{user!r} cannot be the name of a user of the Hub: letters, digits, '.', '_' and '-'")
    with file_system_errors(str(out)):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise AlreadyExists(f"{out} is not empty; name another folder with --out")
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as work:
            for role in ROLES:
                _write(checkout, role, Path(work, role))
            for role in ROLES:
                Path(work, role).rename(out / role)
    folders = {role: out / role for role in ROLES}
    return Rendered(folders, commands(user, folders))


def _write(checkout: Path, role: str, folder: Path) -> None:
    template = Path("examples", "spaces", role)
    for name in (*SHARED, str(template)):
        source, target = checkout / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            try:
                shutil.copytree(source, target, ignore=_LEFT_OUT)
            except shutil.Error as error:  # it goes on after the first file that fails, and lists all
                raise BucketError(f"{target}: {error.args[0][0][2]}") from None
        else:
            shutil.copyfile(source, target)
    for name in CARD:
        (folder / template / name).rename(folder / name)


def commands(user: str, folders: dict[str, Path]) -> list[str]:
    """What makes the bucket and the Spaces, with the `hf` command of huggingface_hub. Secrets come from the caller's
    environment: HF_TOKEN, which may write the bucket (for vllm one that reads is enough), and VLLM_API_KEY."""
    bucket = f"{user}/wordle"
    words = {
        "environment": "",
        "vllm": f" --env BUCKET=hf://buckets/{bucket}",
        "trainer": f" --env BUCKET=hf://buckets/{bucket} --env ENGINE_URL={space_url(user, 'vllm')}"
        f" --env ENVIRONMENT_URL={space_url(user, 'environment')}",
    }
    lines = [f"hf buckets create {bucket} --private --exist-ok"]
    for role, folder in folders.items():
        secrets = "" if role == "environment" else " --secrets HF_TOKEN --secrets VLLM_API_KEY"
        space = f"{user}/deltawire-{role}"
        lines.append(f"hf repos create {space} --type space --sdk docker --exist-ok{words[role]}{secrets}")
        lines.append(f"hf upload {space} {shlex.quote(str(folder))} . --type space")
    return lines


def space_url(user: str, role: str) -> str:
    """Where a Space answers: its name with '-' for all but letters and digits."""
    return f"https://{re.sub(r'[^a-z0-9]+', '-', f'{user}-deltawire-{role}'.lower())}.hf.space"
