"""How reports are printed: a line of text, or with `--json` one object a line."""

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

MIB = 1 << 20


def emit(record: object, text: str, as_json: bool) -> None:
    """Print a record as JSON, or the text that says the same, at once."""
    line = msgspec.json.encode(record, enc_hook=str).decode() if as_json else text
    print(line, flush=True)


def size(count: int) -> str:
    """Bytes, as people read them."""
    return f"{count / MIB:.2f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def show(table: Table) -> None:
    """Print a table whole: where it is too wide, names go on in the next line, and none is cut to look like another."""
    for column in table.columns:
        column.overflow = "fold"
    Console().print(table)


def progress() -> Progress:
    """A bar on stderr that counts things done, and is gone afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def duration(seconds: float) -> str:
    """Seconds, as people say them: 45 s, 3 min, 2 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def plain(text: str, limit: int = 300) -> str:
    """What anyone who may write the bucket may have written, fit for a terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)[:limit]
