"""Stand-ins for the demo's processes, and ways to wait for them that do not sleep through an event."""

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 30.0

TELL = """
import json, os, signal, subprocess, sys, time
def tell(**record):
    print(json.dumps(record), flush=True)
"""
WAIT = TELL + "tell(event='ready', pid=os.getpid())\nsignal.pause()\n"
STUBBORN = (
    TELL
    + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell(event='ready', pid=os.getpid())\n"
    + ("while True: signal.pause()\n")
)
POLITE = (
    TELL
    + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\ntell(event='ready', pid=os.getpid())\n"
    + ("signal.pause()\n")
)
PARENT = (
    TELL
    + "child = subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()'])\n"
    + ("tell(event='ready', pid=os.getpid(), grandchild=child.pid)\nsignal.pause()\n")
)


def python(source: str) -> Sequence[str]:
    """The arguments that run `source`; quick to start, without site packages."""
    return [sys.executable, "-I", "-S", "-u", "-c", source]


def until(look: Callable[[], T | None]) -> T:
    """What `look` finds once it finds something."""
    deadline = time.monotonic() + PATIENCE
    while (found := look()) is None:
        assert time.monotonic() < deadline, "nothing came in time"
        time.sleep(0.01)
    return found


def wait_for_end(pid: int) -> None:
    """Return when the process is gone; it need not be a child of this one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


def is_running(pid: int) -> bool:
    """Whether there is such a process, zombies included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
