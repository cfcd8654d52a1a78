"""How reports are printed: a line of text, or with `--json` one object a line."""

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

MIB = 1 << 20


def emit(record: object, text: str, as_json: bool) -> None:
    """Print a record as JSON, or the text that says the same, at once."""
    if as_json:
        print(msgspec.json.encode(record, enc_hook=str).decode(), flush=True)
    else:
        print("\n".join(plain(line, None) for line in text.split("\n")), flush=True)


def size(count: int) -> str:
    """Bytes, as people read them."""
    return f"{count / MIB:.2f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


class Sheet(Table):
    """A table of text that strangers may have written: none of it is markup, and none moves the cursor."""

    def __init__(self, *heads: str, title: str | None = None) -> None:
        super().__init__(*(plain(head, None) for head in heads), title=None if title is None else plain(title, None))

    def add_row(self, *cells: str) -> None:  # type: ignore[override]  # text alone
        """A row, a text for each column."""
        super().add_row(*(plain(cell, None) for cell in cells))


def show(table: Sheet) -> None:
    """Print a table whole: where it is too wide, names go on in the next line, and none is cut to look like another."""
    for column in table.columns:
        column.overflow = "fold"
    Console(markup=False, emoji=False).print(table)


def progress() -> Progress:
    """A bar on stderr that counts things done, and is gone afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def duration(seconds: float) -> str:
    """Seconds, as people say them: 45 s, 3 min, 2 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def plain(text: str, limit: int | None = 300) -> str:
    """What anyone who may write the bucket may have written, fit for a line of a terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)[:limit]
