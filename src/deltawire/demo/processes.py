"""The processes a command starts: each in a session of its own, output in a log file, none outliving the command."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from deltawire.errors import DeltaWireError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
LOG_END_LINES = 20
HURRY = 3.0
"""seconds of grace for each when something has failed or a person pressed Ctrl-C"""
_SUPERVISOR_ALLOWANCE = 5.0
"""seconds a supervisor has, after the grace of its command, to kill it and report"""


class ProcessFailed(DeltaWireError):
    """A process ended when it should not have, or did not get ready; the message ends with its log."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to run: arguments, what to add to the environment, where, and seconds to end in after SIGTERM. A `lasting`
    one runs until it is asked to end; that it ended by itself is a failure whatever its exit code."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()
    grace: float = 10.0
    lasting: bool = True


class Tail:
    """The lines that appear in a file, a whole one at a time. The file may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def records(self) -> Iterator[dict[str, object]]:
        """The JSON objects among the lines added since the last call; other lines are skipped."""
        for line in self._lines():
            with suppress(msgspec.DecodeError):
                record = msgspec.json.decode(line)
                if isinstance(record, dict):
                    yield record

    def _lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


class Child:
    """One process under a supervisor (see `supervisor`). It ends when `close` is called or when this process is gone.

    Both its outputs go to `log`. Not thread-safe.
    """

    def __init__(self, command: Command, log: Path) -> None:
        self.command = command
        self.name = command.name
        self.log = log
        self.output = Tail(log)
        self.started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        lifeline, self._lifeline = os.pipe()
        try:
            with log.open("ab") as output:
                self._supervisor = subprocess.Popen(
                    [sys.executable, "-I", "-S", SUPERVISOR, str(lifeline), str(command.grace), *command.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=command.folder,
                    env={**os.environ, **command.environment},
                    pass_fds=[lifeline],
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)

    @property
    def code(self) -> int | None:
        """The exit code (128 + n after signal n), None while it runs."""
        return self._supervisor.poll()

    def ask_to_end(self, grace: float | None = None) -> None:
        """Have it sent SIGTERM, and SIGKILL after `grace` seconds, by default the command's. Returns at once; only the
        first call counts."""
        if self._lifeline >= 0:
            if grace is not None:
                with suppress(BrokenPipeError):  # it has ended already
                    os.write(self._lifeline, str(grace).encode())
            os.close(self._lifeline)
            self._lifeline = -1

    def close(self) -> int:
        """End it and wait for that. Returns its exit code."""
        self.ask_to_end()
        try:
            return self._supervisor.wait(self.command.grace + _SUPERVISOR_ALLOWANCE)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            return self._supervisor.wait()

    def failed(self, problem: str) -> ProcessFailed:
        """The error that says what is wrong with this process and shows the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_END_LINES:]
        end = "\n".join(f"  {line}" for line in lines) or "  (nothing was written)"
        return ProcessFailed(f"{self.name} {problem}; {self.log} ends:\n{end}")


class Children:
    """The processes started so far, ended together and in reverse when this closes."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, Child] = {}

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children.values())

    def start(self, command: Command) -> Child:
        """Start a process; its log is NAME.log."""
        child = Child(command, self._logs / f"{command.name}.log")
        self._children[command.name] = child
        return child

    def close(self, grace: float | None = None) -> dict[str, int]:
        """End every process that still runs: all are asked at once, the last started is waited for first. Exit codes
        by name, those of processes that had ended before included."""
        for child in reversed(self._children.values()):
            child.ask_to_end(grace)
        return {child.name: child.close() for child in reversed(self._children.values())}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else HURRY)


def free_port() -> int:
    """A port of loopback that nothing listens on now, for a process that needs one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
