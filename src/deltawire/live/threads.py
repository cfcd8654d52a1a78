"""Writes to host memory shared among the cores that this process may use: one core waits for memory and does not fill
the bus, and while a server is paused the others have little to do."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from deltawire.live import cores

MOST = 4
"""threads; two were measured to write 1.9 times as fast as one, where each has a core"""
WORTH = 200_000
"""elements, about a millisecond's work, below which starting a thread does not pay"""


def share(jobs: Sequence[Callable[[], None]], elements: int) -> None:
    """Do every job, in any order; all together write so many elements. The first error is raised when nothing is under
    way any more; jobs that no thread had begun by then are left out.

    A thread that is done takes the next job, for a core may be busy: vLLM's engine process spins on one while it waits.
    """
    usable = cores.allowed() if elements >= WORTH else set()
    others = cores.beside(usable)
    waiting, errors = deque(jobs), list[BaseException]()

    def run() -> None:
        try:
            while waiting and not errors:
                try:
                    job = waiting.popleft()
                except IndexError:  # another thread took the last
                    return
                job()
        except BaseException as error:
            errors.append(error)

    def run_beside() -> None:
        cores.move(others)
        run()

    count = min(len(usable), MOST, len(jobs)) - 1
    threads = [threading.Thread(target=run_beside, name="deltawire-write") for _ in range(count)]
    begun = False
    while True:
        try:
            if not begun:
                begun = True
                _start(threads)
                run()
            for thread in threads:
                if thread.ident is not None:  # one that has no number never began, or will see the error first
                    thread.join()
            break
        except BaseException as error:  # an interrupt: whoever undoes what was written must be alone when it does
            errors.append(error)
    if errors:
        raise errors[0]


def _start(threads: Sequence[threading.Thread]) -> None:
    """As many as the system has room for: the others' work is done by those that there are."""
    with suppress(RuntimeError):
        for thread in threads:
            thread.start()
