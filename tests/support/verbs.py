"""`deltawire` as people run it: a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner

from deltawire.cli import app


def run_verb(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A verb with its arguments, to its end within a minute; fails unless it ends with this exit code."""
    command = [sys.executable, "-m", "deltawire.cli", *map(str, arguments)]
    # readline, which pytest loads, puts the size of a terminal into the environment that children inherit.
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def say(*arguments: object, **environ: str) -> str:
    """What a verb prints, run in this process, on a wide terminal; raises what it raises."""
    environment = {"COLUMNS": "250", **environ}
    done = CliRunner().invoke(app, [*map(str, arguments)], env=environment, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def records(*arguments: object) -> list[dict[str, Any]]:
    """What a verb prints with --json."""
    return [json.loads(line) for line in say(*arguments, "--json").splitlines()]
