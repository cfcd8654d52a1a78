"""Writes to host memory on all cores that this process may use.

One core waits for memory and does not fill the bus, and while a server is paused the others have little to do.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from deltawire.live import cores

MOST = 4
"""threads; two were measured to write 1.9 times as fast as one, where each has a core"""
WORTH = 200_000
"""elements, about a millisecond's work, below which starting a thread does not pay"""


def run_together(jobs: Sequence[Callable[[], None]], elements: int) -> None:
    """Do every job, in any order; all together write so many elements. The first error is raised when no job runs any
    more; jobs that no thread had begun by then are left out.

    A thread that is done takes the next job, for a core may be busy: a server's process (vLLM's engine) may spin on one
    while it waits.
    """
    usable = cores.allowed() if elements >= WORTH else set()
    queue, others = _Queue(jobs), cores.beside(usable)
    count = min(len(usable), MOST, len(jobs)) - 1
    threads = [threading.Thread(target=queue.run_on, args=(others,), name="deltawire-write") for _ in range(count)]
    begun = False
    while True:
        try:
            if not begun:
                begun = True
                _start(threads)
                queue.run()
            for thread in threads:
                if thread.ident is not None:  # one that has no number never began, or will see the error first
                    thread.join()
            break
        except BaseException as error:  # an interrupt: what undoes the writes must be alone when it does
            queue.errors.append(error)
    if queue.errors:
        raise queue.errors[0]


class _Queue:
    """Jobs that threads take one by one, until there are no more or one of them fails."""

    def __init__(self, jobs: Sequence[Callable[[], None]]) -> None:
        self._waiting = deque(jobs)
        self.errors: list[BaseException] = []

    def run(self) -> None:
        """Take jobs on this thread; what one raises is kept."""
        try:
            while self._waiting and not self.errors:
                try:
                    job = self._waiting.popleft()
                except IndexError:  # another thread took the last
                    return
                job()
        except BaseException as error:
            self.errors.append(error)

    def run_on(self, usable: set[int]) -> None:
        """The same, on these cores."""
        cores.move(usable)
        self.run()


def _start(threads: Sequence[threading.Thread]) -> None:
    """As many as the system has room for: the others' work is done by those that there are."""
    with suppress(RuntimeError):
        for thread in threads:
            thread.start()
