"""What `deltawire follow` tells while it runs: lines of text, JSON with --json, a progress bar on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from deltawire.cli.printing import duration, emit, plain, size
from deltawire.errors import error_text

if TYPE_CHECKING:
    from deltawire.follow.follower import UpdateReport
    from deltawire.follow.health import Health
    from deltawire.follow.news import Fetching, News
    from deltawire.vllm.adapters import AdapterReport

ANNOUNCED = 16 << 20
"""bytes of an anchor from which its fetching is shown; less is there at once"""


class Teller:
    """Prints what a follower says. `bar` chooses a progress bar for an anchor over plain lines. `server` is which
    one it follows, where there are several."""

    def __init__(self, *, as_json: bool, bar: bool | None = None, server: str | None = None) -> None:
        self._console = Console(stderr=True)
        self._json, self._server = as_json, server
        self._bar = self._console.is_terminal and not as_json if bar is None else bar
        self._progress: Progress | None = None

    def line(self, event: str, text: str, **facts: object) -> None:
        """Print an event."""
        self._end_bar()
        if self._server is not None:
            text, facts = f"{self._server}: {text}", {"engine": self._server, **facts}
        emit({"event": event, **facts}, plain(text, None), self._json)

    def update(self, report: "UpdateReport | AdapterReport") -> None:
        """A version is served."""
        self.line("update", _as_text(report), **msgspec.to_builtins(report))

    def problem(self, error: Exception, health: "Health | None" = None) -> None:
        """Something stands in the way, or still does."""
        lasted = health.problem_age if health is not None else 0.0
        still = f" for {duration(lasted)}" if lasted >= 1 else ""
        self.line("problem", f"problem{still}: {error_text(error)}", error=error_text(error), seconds=round(lasted, 1))

    def news(self, news: "News") -> None:
        """What a follower says between updates."""
        from deltawire.follow.news import Current, Fetching, Note, Waiting

        facts = msgspec.to_builtins(news)
        event = facts.pop("event")
        match news:
            case Waiting(reason, seconds):
                still = f" for {duration(seconds)}" if seconds >= 1 else ""
                self.line(event, f"waiting{still}: {reason}", **facts)
            case Current(_, version):
                self.line(event, f"version {version}: the server is current", **facts)
            case Note(note):
                self.line(event, f"note: {note}", **facts)
            case Fetching() if news.total >= ANNOUNCED:
                if self._bar:
                    self._draw(news)
                else:
                    text = f"version {news.version}: fetching an anchor, {size(news.done)} of {size(news.total)}"
                    self.line(event, text, **facts)

    def _draw(self, news: "Fetching") -> None:
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
            rest = (TransferSpeedColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, *rest, console=self._console, transient=True)
            self._progress.add_task(f"fetching version {news.version}", total=news.total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=news.done, total=news.total)

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def to_the_end(self, stop: Callable[[], None], health: "Health | None") -> Iterator[None]:
        """Until the block ends: SIGTERM calls `stop`, and the last line says why it ended and what is served on, as
        far as that is one version."""
        import signal

        ended_by: list[str] = []

        def end(number: int, frame: object) -> None:
            ended_by.append(signal.Signals(number).name)
            signal.signal(number, before or signal.SIG_DFL)  # the second one ends it as it would any program
            stop()

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        except KeyboardInterrupt:
            ended_by.append("Ctrl-C")
            raise
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            if ended_by:
                served = None if health is None or health.served is None else health.served.version
                kept = "what it serves" if served is None else f"version {served}"
                who = "every server" if health is None else "the server"
                text = f"stopped by {ended_by[0]}; {who} keeps {kept}"
                self.line("stopped", text, by=ended_by[0], version=served)


def _as_text(update: "UpdateReport | AdapterReport") -> str:
    from deltawire.follow.follower import UpdateReport

    how = f"pause {update.pause_ms:.1f} ms" if isinstance(update, UpdateReport) else f"load {update.load_s:.2f} s"
    return (
        f"version {update.version}: {update.changed:,} weights, {size(update.wire_bytes)}, {how}, "
        f"{update.publish_to_served_s:.2f} s after publish"
    )
