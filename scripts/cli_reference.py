"""Write docs/CLI.md from the commands' own --help and what they print on a small run; `make docs` runs it and a test
checks that it is current."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from cli_examples import WIDTH, transcripts
from typer.testing import CliRunner

from deltawire.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "CLI.md"
INTRODUCTION = """# The `deltawire` command

Written by `make docs`: each command's `--help`, and what it prints on a small run. Ids, keys,
seconds and folders stand for those of your run. `--json` prints the same as one JSON object a line.

An error is one line, `deltawire: Kind: what, where, what to do`, and exit code 1.
[OPERATIONS.md](OPERATIONS.md) has every kind.
"""


def commands(group: Any) -> Iterator[str]:
    """The words of every command, those of groups included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from (f"{name} {inner}" for inner in commands(command))
        else:
            yield name


def reference() -> str:
    """The whole page."""
    parts, shown = [INTRODUCTION], transcripts()
    for command in sorted(commands(typer.main.get_command(app))):
        result = CliRunner().invoke(app, [*command.split(), "--help"], env=WIDTH, prog_name="deltawire")
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## {command}\n\n```text\n{text}\n```\n")
        if command in shown:
            parts.append(f"```text\n{shown[command].rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference())
    print(f"wrote {PAGE.name}", file=sys.stderr)
