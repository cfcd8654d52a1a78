"""Stand-ins for the demo's processes, and a way to wait for their end."""

import os
import select
import sys
from collections.abc import Sequence

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
