"""The English of what people read: short sentences, short lines, and none of the words that read as translated."""

import ast
import re
from pathlib import Path
from statistics import median

import pytest
from prose import Sentence, prose_lines, sentences

REPOSITORY = Path(__file__).parents[1]
AT_THE_ROOT = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")
PAGES = [*(REPOSITORY / name for name in AT_THE_ROOT), *sorted((REPOSITORY / "docs").glob("*.md"))]
SOURCES = sorted((REPOSITORY / "src" / "deltawire").rglob("*.py"))
LONGEST = 30
"""words of a sentence"""
USUAL = 15
"""words that half of a page's sentences stay below"""
WIDEST = 100
"""columns of a line"""
BANNED = re.compile(r"\b(?:anew|whoever|told|what (?:is|are) no(?:ne)?)\b", re.I)
SPECIFICATION = "docs/FORMAT.md"
"""its fields stand in tables as wide as they need, and its requirements are lists whose items are one sentence"""
NAMES = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def lines_of(name: str) -> list[tuple[int, str]]:
    """Lines that people wrote. The reference shows what commands print, as wide as they print it."""
    text = read(name)
    return list(prose_lines(text)) if name == "docs/CLI.md" else list(enumerate(text.splitlines(), 1))


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_is_long(name):
    assert not [f"line {s.line}, {s.words} words: {s.text}" for s in sentences(read(name)) if s.words > LONGEST]


@pytest.mark.parametrize("name", [name for name in NAMES if name != SPECIFICATION])
def test_most_sentences_are_short(name):
    counted = [found.words for found in sentences(read(name)) if found.words and not found.in_a_table]
    assert median(counted) < USUAL


@pytest.mark.parametrize("name", [name for name in NAMES if name != SPECIFICATION])
def test_no_line_is_wide(name):
    assert not [f"line {number}: {line}" for number, line in lines_of(name) if len(line) > WIDEST]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_no_banned_word(name):
    assert not [f"line {number}: {line}" for number, line in lines_of(name) if BANNED.search(line)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(REPOSITORY / "src").as_posix())
def test_no_text_of_the_library_has_a_banned_word(source):
    """Errors, help and docstrings: every string."""
    texts = (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Constant))
    strings = ((node.lineno, node.value) for node in texts if isinstance(node.value, str))
    found = ((line, BANNED.search(" ".join(text.split()))) for line, text in strings)
    assert not [f"line {line}: {word.string[max(0, word.start() - 40) :][:100]}" for line, word in found if word]


def test_what_is_measured_is_what_a_reader_reads():
    page = """# A heading. Of two.

One sentence, with `code. In it` and a [link there](there.md). Two! Is *this* three? "Yes." (So.)

- An item that has
  two lines, e.g. these. Four.
1. Another

<!-- A comment. -->
| a cell | two. Sentences |
|---|---|
```python
code. It. Is.
```
"""
    texts = [found.text for found in sentences(page)]
    assert texts == [
        *("One sentence, with `code. In it` and a link there.", "Two!", "Is *this* three?", '"Yes."', "(So.)"),
        *("An item that has two lines, e.g. these.", "Four.", "Another", "a cell", "two.", "Sentences"),
    ]
    assert Sentence(1, "one / two three-four `five six`").words == 5


def test_a_long_sentence_is_seen(monkeypatch):
    assert [found.words for found in sentences("word " * 31 + "end.")] == [32]
    assert BANNED.search("It is made Anew") and BANNED.search("of what is no pair") and not BANNED.search("retold")
