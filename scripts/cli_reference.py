"""Write docs/CLI.md from the commands' own --help; `make docs` runs it and a test checks that it is current."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from deltawire.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "CLI.md"
WIDTH = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


def commands(group: Any) -> Iterator[str]:
    """The words of every command, those of groups included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from (f"{name} {inner}" for inner in commands(command))
        else:
            yield name


def reference() -> str:
    """The whole page."""
    parts = ["# The `deltawire` command\n\nWritten by `make docs` from `--help`.\n"]
    for command in sorted(commands(typer.main.get_command(app))):
        result = CliRunner().invoke(app, [*command.split(), "--help"], env=WIDTH, prog_name="deltawire")
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## {command}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference())
    print(f"wrote {PAGE.name}", file=sys.stderr)
