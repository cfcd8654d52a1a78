"""The sentences of a Markdown page: what a reader reads, without code blocks, comments, headings and addresses."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

FENCE = re.compile(r"^ *(```|~~~)")
COMMENT = re.compile(r"<!--.*?-->", re.S)
ITEM = re.compile(r"^ *(?:[-*+]|\d+\.) +")
RULE = re.compile(r"^\|[\s|:-]+\|?$")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<=[.!?])[)\"*_`]*(?=\s+\S)|(?<=[.!?][*)])(?=\s)")
ABBREVIATIONS = re.compile(r"\b(?:e\.g|i\.e|vs|cf|etc)\.$")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence, or a fragment that stands alone, and the line of the page on which its paragraph begins."""

    line: int
    text: str
    in_a_table: bool = False

    @property
    def words(self) -> int:
        """Words, as they stand between spaces; a sign alone is none."""
        return sum(any(letter.isalnum() for letter in word) for word in self.text.split())


def sentences(page: str) -> list[Sentence]:
    """Every sentence of a page, those of list items and of table cells included."""
    return [Sentence(line, text, cell) for line, block, cell in _blocks(page) for text in _split(block)]


def prose_lines(page: str) -> Iterator[tuple[int, str]]:
    """Lines outside code blocks and comments, with their numbers."""
    page = COMMENT.sub(lambda found: "\n" * found[0].count("\n"), page)
    inside = False
    for number, line in enumerate(page.splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def _blocks(page: str) -> Iterator[tuple[int, str, bool]]:
    """Paragraphs, list items and table cells as one line each; whether it is a cell."""
    start, lines, before = 0, [], -1
    for number, line in prose_lines(page):
        table, heading = line.lstrip().startswith("|"), line.startswith("#")
        fresh = number != before + 1 or not line.strip() or table or heading or ITEM.match(line)
        before = number
        if fresh and lines:
            yield start, " ".join(lines), False
            lines = []
        if table and not RULE.match(line.strip()):
            yield from ((number, cell.strip(), True) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
        elif line.strip() and not table and not heading:
            start = start if lines else number
            lines.append(ITEM.sub("", line, count=1).strip())
    if lines:
        yield start, " ".join(lines), False


def _split(block: str) -> Iterator[str]:
    text = LINK.sub(r"\1", block)
    ends = [0, *(found.end() for found in END.finditer(text) if not _inside(text, found.start())), len(text)]
    for start, end in pairwise(ends):
        if text[start:end].strip():
            yield text[start:end].strip()


def _inside(text: str, place: int) -> bool:
    """Whether a place is within code, or behind an abbreviation."""
    return text[:place].count("`") % 2 == 1 or bool(ABBREVIATIONS.search(text[:place]))
