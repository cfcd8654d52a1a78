"""Programs that tests run as processes of their own, one a file."""

from pathlib import Path


def program(name: str) -> str:
    """The path of one of these programs, to be run by a Python."""
    return str(Path(__file__).with_name(f"{name}.py"))
