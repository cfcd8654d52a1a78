"""How reports are printed: a line of text, or with `--json` one object a line."""

import os
import sys

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

MIB = 1 << 20
SHORT = 10
"""letters of a word that a table does not break"""
PLAIN_WIDTH = 160
"""columns where no terminal says how many it has"""


def emit(record: object, text: str, as_json: bool) -> None:
    """Print a record as JSON, or the text that says the same, at once."""
    if as_json:
        print(msgspec.json.encode(record, enc_hook=str).decode(), flush=True)
    else:
        print("\n".join(plain(line, None) for line in text.split("\n")), flush=True)


def size(count: int) -> str:
    """Bytes, as people read them."""
    return f"{count / MIB:.2f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def counted(number: int, one: str) -> str:
    """How many there are, of what one is called: "1 delta", "2,000 deltas"."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


class Sheet(Table):
    """A table of text that strangers may have written: none of it is markup, and none moves the cursor."""

    def __init__(self, *heads: str, title: str | None = None) -> None:
        super().__init__(*(plain(head, None) for head in heads), title=None if title is None else plain(title, None))

    def add_row(self, *cells: str) -> None:  # type: ignore[override]  # text alone
        """A row, a text for each column."""
        super().add_row(*(plain(cell, None) for cell in cells))


def show(table: Sheet) -> None:
    """Print a table whole: where it is too wide, names go on in the next line, and none is cut to look like another."""
    arrange(table)
    title, table.title = table.title, None  # on its own line, for it may be wider than the table
    if title is not None:
        print(title)
    plain_console().print(table, crop=False)


def arrange(table: Table) -> None:
    """Give a table the look of all of them: no frame, long names folded, and no short word broken in two."""
    table.box, table.show_edge, table.pad_edge = SIMPLE_HEAD, False, False
    table.collapse_padding = True
    for column in table.columns:
        words = [word for cell in (column.header, *column.cells) for word in str(cell).split()]
        column.overflow = "fold"
        column.min_width = max((len(word) for word in words if len(word) <= SHORT), default=0)


def plain_console() -> Console:
    """What prints on stdout, as wide as the terminal; a pipe and a file take long lines."""
    return Console(
        markup=False, emoji=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    )


def progress() -> Progress:
    """A bar on stderr that counts things done, and is gone afterwards. Where stderr is no terminal there is none."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def duration(seconds: float) -> str:
    """Seconds, as people say them: 45 s, 3 min, 2 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def plain(text: str, limit: int | None = 300) -> str:
    """What anyone who may write the bucket may have written, fit for a line of a terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)[:limit]
