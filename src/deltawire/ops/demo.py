"""The demo: five processes that share nothing but a bucket and HTTP, from the first start to the final audit."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console

from deltawire.errors import AlreadyExists
from deltawire.ops import audit
from deltawire.ops.cast import FULL, QUICK, Cast, find_checkout
from deltawire.ops.processes import Child, Children, Command, ProcessFailed, Tail
from deltawire.ops.screen import Screen, final_table, open_screen
from deltawire.ops.story import Story
from deltawire.ops.summary import DemoSummary, summarize

T = TypeVar("T")
TICK = 0.1
"""seconds between two looks at the processes; all timings shown are measured by the processes themselves"""
CLEAN = {0, 128 + 2, 128 + 15}
"""exit codes of a process that was told to end and did, in its own way or by the signal"""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`out`: where logs and summary.json go, runs/demo-<time> if None. `quick`: a few steps of each act. `plain`: lines
    even on a terminal. `start_patience`, `news_patience`: seconds a process may take to get ready, and the trainer or
    the follower may go on without a word, before the demo gives up."""

    out: Path | None = None
    quick: bool = False
    plain: bool = False
    start_patience: float = 240.0
    news_patience: float = 120.0


def run_demo(options: DemoOptions, *, cast: Cast | None = None, console: Console | None = None) -> DemoSummary:
    """Train a tiny model by RL while vLLM serves it, its weights travelling through a bucket server; show it, audit it,
    and write summary.json. No process is left when this returns or raises, nor when this process is killed.

    Raises NoExamples outside a checkout, AlreadyExists for a folder in use, ProcessFailed naming the process that failed
    with the end of its log.
    """
    console = console or Console()
    if cast is None:
        folder = options.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
        cast = Cast(find_checkout(), folder.absolute(), QUICK if options.quick else FULL)
    if cast.folder.exists() and any(cast.folder.iterdir()):
        raise AlreadyExists(f"{cast.folder} is not empty; name another folder with --out")
    with Children(cast.folder / "logs") as children, open_screen(console, plain=options.plain) as screen:
        stage = Stage(children, screen, Story(cast.acts), options)
        stage.tell(f"logs and figures in {cast.folder}")
        summary = play(stage, cast)
        stage.end_all()
    (cast.folder / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    console.print(final_table(summary))
    return summary


class Stage:
    """The processes, what they have said so far, and the screen. Ended by its Children."""

    def __init__(self, children: Children, screen: Screen, story: Story, options: DemoOptions) -> None:
        self.children = children
        self.story = story
        self._screen = screen
        self._options = options
        self._began = time.monotonic()
        self._tails: dict[str, Tail] = {}
        self._heard = self._began

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    def tell(self, text: str) -> None:
        """Show an event."""
        self._screen.tell(text, self.seconds)

    def start(self, command: Command, *, records: Path | None = None) -> Child:
        """Start a process; its records are read from `records`, else from its output."""
        child = self.children.start(command)
        self._tails[command.name] = Tail(records) if records else child.output
        if command.name in self.story.lights:
            self.story.lights[command.name] = "starting"
        return child

    def ready(self, child: Child, look: Callable[[], T | None]) -> T:
        """What `look` finds once the process is ready. Raises ProcessFailed."""
        found = self.watch(child, look, "get ready", lambda: child.started, self._options.start_patience)
        self.story.lights[child.name] = "ready"
        self.tell(f"{child.name} is ready after {time.monotonic() - child.started:.0f} s")
        return found

    def news(self, child: Child, look: Callable[[], T | None]) -> T:
        """What `look` finds, as long as there are records to read now and then. Raises ProcessFailed."""
        self._heard = time.monotonic()
        return self.watch(child, look, "say anything new", lambda: self._heard, self._options.news_patience)

    def watch(
        self, child: Child, look: Callable[[], T | None], what: str, since: Callable[[], float], patience: float
    ) -> T:
        """Read, check and draw until `look` finds something. Raises ProcessFailed when a process failed, or when
        `patience` seconds passed since `since()`: then `child` is the one to blame."""
        while True:
            self._look_at_all()
            if (found := look()) is not None:
                return found
            silent = time.monotonic() - since()
            if silent > patience:
                self.story.lights[child.name] = "failed"
                raise child.failed(f"did not {what} in {patience:.0f} s")
            starting = [name for name, light in self.story.lights.items() if light == "starting"]
            ages = (f"{name} is starting, {time.monotonic() - self.children[name].started:.0f} s" for name in starting)
            self._screen.draw(self.story, "; ".join(ages), self.seconds)
            time.sleep(TICK)

    def _look_at_all(self) -> None:
        for name, tail in self._tails.items():
            for record in tail.records():
                self._heard = time.monotonic()
                self.story.hear(name, record)
        self.children.check()

    def end(self, name: str) -> None:
        """End a process and wait. Raises ProcessFailed if it did not end cleanly."""
        child = self.children[name]
        code = child.close()
        self.story.lights[name] = "ended"
        if code not in CLEAN:
            raise child.failed(f"did not end cleanly (exit code {code})")

    def end_all(self) -> None:
        """End the processes, the ones that use others first. Raises ProcessFailed."""
        for name in ("follower", "vllm", "environment", "bucket-server"):
            self.end(name)
        self._screen.draw(self.story, "", self.seconds)
