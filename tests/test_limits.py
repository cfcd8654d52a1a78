"""A file fits in a head, a function on a screen, and a room says in one sentence what belongs in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from prose import sentences

SOURCE = Path(__file__).parents[1] / "src" / "deltawire"
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(path.parent for path in SOURCE.glob("*/__init__.py"))
FILE_LINES = 300
FUNCTION_LINES = 40
"""of a function, its decorators, signature and body; its docstring is free"""


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """The functions of a source that are over the limit, and their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min(part.lineno for part in [node, *node.decorator_list])
            lines = (node.end_lineno or 0) - start + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > FUNCTION_LINES:
                yield node.name, lines


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_and_its_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= FILE_LINES
    assert list(long_functions(source)) == []


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_a_room_says_in_one_sentence_what_belongs_there(room):
    says = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert says is not None
    assert len(sentences(says)) == 1, says


def test_the_check_itself_sees_a_long_function():
    body = "    x = 1\n" * 40
    assert list(long_functions(f"def short():\n{body[: -len('    x = 1' + chr(10))]}")) == []
    assert list(long_functions(f"def long():\n{body}")) == [("long", 41)]
    assert list(long_functions(f'def told():\n    """One.\n\n    Two.\n    """\n{body}')) == [("told", 41)]
    assert list(
        long_functions(f"class A:\n    @b\n    async def c(self):\n    {body[:-10].replace(chr(10), chr(10) + '    ')}")
    )
