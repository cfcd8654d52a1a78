"""Runs one command and never lets it outlive its owner; standard library only, run as a script.

    python supervisor.py LIFELINE GRACE COMMAND…

LIFELINE is a file descriptor, the reading end of a pipe whose other end the owner holds. When it closes, because the
owner said so or because the owner is gone (a kill -9 closes it too), the command gets SIGTERM, and GRACE seconds later
its whole process group gets SIGKILL; an owner in a hurry writes another number of seconds before it closes. What the
command leaves behind in its group is killed as well. The exit code is the command's, 128 + n if signal n ended it, 127
if it could not be started.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress


def main(arguments: list[str]) -> int:
    lifeline, grace, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    asked: queue.SimpleQueue[float] = queue.SimpleQueue()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.put(grace))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127
    threading.Thread(target=_watch, args=(lifeline, asked, grace), daemon=True).start()
    threading.Thread(target=_end, args=(child.pid, asked), daemon=True).start()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # unreaped, so the group's number cannot be given away
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return 128 - code if code < 0 else code


def _watch(lifeline: int, asked: "queue.SimpleQueue[float]", grace: float) -> None:
    with open(lifeline, "rb") as owner:
        asked.put(float(owner.read() or grace))


def _end(pid: int, asked: "queue.SimpleQueue[float]") -> None:
    grace = asked.get()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    time.sleep(grace)
    _signal_group(pid, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
