"""Watches the demo's processes until what is waited for happens, one of them fails, or one keeps silent too long."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from deltawire.demo.games import Patience
from deltawire.demo.processes import Child, Children, Command, Tail
from deltawire.demo.progress import Light, Progress
from deltawire.demo.screen import Screen

T = TypeVar("T")
TICK = 0.1
"""seconds between two looks at the processes; all timings shown are measured by the processes themselves"""
CLEAN = {0, 128 + 2, 128 + 15}
"""exit codes of a process that was asked to end and did, in its own way or by the signal"""


class Monitor:
    """The processes, what they have said so far, and the screen. Ended by its Children."""

    def __init__(self, children: Children, screen: Screen, progress: Progress, patience: Patience) -> None:
        self.children = children
        self.progress = progress
        self._screen = screen
        self._patience = patience
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
        if command.lasting or command.name in self.progress.lights:
            self.progress.lights[command.name] = "starting"
        return child

    def ready(self, child: Child, look: Callable[[], T | None]) -> T:
        """What `look` finds once the process is ready. Raises ProcessFailed."""
        found = self.watch(child, look, "get ready", lambda: child.started, self._patience.start)
        self._light_up(child.name)
        return found

    def _light_up(self, name: str) -> None:
        if self.progress.lights.get(name) == "starting":
            self.progress.lights[name] = "ready"
            self.tell(f"{name} is ready after {time.monotonic() - self.children[name].started:.0f} s")

    def news(self, child: Child, look: Callable[[], T | None]) -> T:
        """What `look` finds, as long as there are records to read now and then. Raises ProcessFailed."""
        self._heard = time.monotonic()
        return self.watch(child, look, "say anything new", lambda: self._heard, self._patience.news)

    def watch(
        self, child: Child, look: Callable[[], T | None], what: str, since: Callable[[], float], patience: float
    ) -> T:
        """Read, check and draw until `look` finds something. Raises ProcessFailed when a process failed, or when
        `patience` seconds passed since `since()`: then `child` is the one to blame."""
        while True:
            self._look_at_all()
            if (found := look()) is not None:
                return found
            if time.monotonic() - since() > patience:
                self._fail(child, f"did not {what} in {patience:g} s")
            self._draw(child)
            time.sleep(TICK)

    def _look_at_all(self) -> None:
        for name, tail in self._tails.items():
            for record in tail.records():
                self._heard = time.monotonic()
                self.progress.hear(name, record)
                if self.progress.has_said_ready(name):
                    self._light_up(name)
        for child in self.children:
            if child.code == 0 and not child.command.lasting:
                self._set_light(child.name, "ended")
            elif child.code is not None:
                self._fail(child, f"ended with exit code {child.code}")

    def _fail(self, child: Child, problem: str) -> NoReturn:
        self._set_light(child.name, "failed")
        self._draw()
        raise child.failed(problem)

    def _set_light(self, name: str, light: Light) -> None:
        if name in self.progress.lights:
            self.progress.lights[name] = light

    def _draw(self, awaited: Child | None = None) -> None:
        now, lights = time.monotonic(), self.progress.lights
        starting = [self.children[name] for name, light in lights.items() if light == "starting"]
        waiting = [f"{child.name} is starting, {now - child.started:.0f} s" for child in starting]
        if awaited is not None and awaited.name not in lights:
            doing = self.progress.doing.get(awaited.name, "at work")
            waiting.append(f"{awaited.name} is {doing}, {now - awaited.started:.0f} s")
        self._screen.draw(self.progress, "; ".join(waiting), self.seconds)

    def url(self, child: Child) -> str:
        """The URL a process says it is ready at. Raises ProcessFailed."""
        return self.ready(child, lambda: self.progress.urls.get(child.name))

    def finished(self, child: Child) -> None:
        """Return when a process ended by itself, and well. Raises ProcessFailed."""
        now = time.monotonic()
        self.watch(child, lambda: True if child.code == 0 else None, "end", lambda: now, self._patience.start)

    def end_all(self) -> None:
        """End the processes, each before those it uses. Raises ProcessFailed for one that does not end cleanly."""
        for child in reversed(list(self.children)):
            code = child.close()
            if code not in CLEAN:
                self._fail(child, f"did not end cleanly (exit code {code})")
            self._set_light(child.name, "ended")
            self._draw()
