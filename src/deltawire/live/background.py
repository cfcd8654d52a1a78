"""One thread of a worker's own, for what may take long: waiting for a store, or reading all of memory.

The server's own thread never waits for it. It asks how far the job is. Where the job must not meet a forward pass, that
thread lends itself to the job for a moment between two.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from deltawire.errors import EngineUnavailable
from deltawire.live import cores

T = TypeVar("T")
NAME = "deltawire-stage"
"""of the threads that run jobs"""
NAP = 0.002
"""seconds between looks of a server's thread that was asked to wait for a job"""


class Abandoned(Exception):
    """Nobody waits for this job any more, and nothing may come of it."""


class Errand(NamedTuple):
    """What a job wants done between two forward passes, and where the outcome goes."""

    work: Callable[[], Any]
    outcome: "Future[Any]"


class Job(NamedTuple):
    """What runs: what it does, for people, when it began, by the monotonic clock, and the bucket that it reads for a
    follower, if any."""

    what: str
    since: float
    bucket: str | None


class Doing(NamedTuple):
    """What a job does, for people, for how many seconds so far, and the bucket it reads for a follower, if any."""

    what: str
    seconds: float
    bucket: str | None


class Background:
    """Runs one job at a time. `on_start` prepares the thread of each (its device, for instance).

    Every method but `between_passes` is called on the server's own thread.
    """

    def __init__(self, on_start: Callable[[], None] = lambda: None) -> None:
        self._on_start = on_start
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None
        self._job: Job | None = None
        self._errand: Errand | None = None

    def begin(self, doing: str, job: Callable[[], None], *, bucket: str | None = None) -> bool:
        """Start a job, which raises nothing; False while another runs, which then has our thread for what it waits
        for. `doing` says what it does, for people; `bucket` what it reads, for a follower."""
        if not self._busy.acquire(blocking=False):
            self.lend()
            return False
        self._job = Job(doing, time.monotonic(), bucket)
        try:
            run = functools.partial(self._run, job, self._busy)
            self._thread = threading.Thread(target=run, name=NAME, daemon=True)
            self._thread.start()
        except BaseException:
            self._end(self._busy)
            raise
        return True

    def abandon(self) -> None:
        """Leave the job to itself, if one runs (it may wait for a store for ever): another may be begun at once."""
        waiting, self._errand = self._errand, None
        self._busy, self._job, self._thread = threading.Lock(), None, None
        if waiting is not None:
            waiting.outcome.set_exception(Abandoned())

    def is_abandoned(self) -> bool:
        """Whether this thread is that of a job that was abandoned."""
        thread = threading.current_thread()
        return thread.name == NAME and thread is not self._thread

    def go_on(self) -> None:
        """Called by a job before it changes anything that others see. Raises Abandoned."""
        if self.is_abandoned():
            raise Abandoned

    @property
    def doing(self) -> Doing | None:
        """What the job does; None without one."""
        if (job := self._job) is None:
            return None
        return Doing(job.what, time.monotonic() - job.since, job.bucket)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep jobs out meanwhile; the job itself may enter. Raises EngineUnavailable while one runs: waiting for it
        would keep the server from generating."""
        self.go_on()
        if threading.current_thread() is self._thread:
            yield
            return
        if not self._busy.acquire(blocking=False):
            doing = self.doing or Doing("another call", 0.0, None)
            raise EngineUnavailable(
                f"the worker is busy, {doing.what} since {doing.seconds:.0f} s: ask again when it is not"
            )
        try:
            yield
        finally:
            self._busy.release()

    def between_passes(self, errand: Callable[[], T]) -> T:
        """Called by a job: have the server's own thread do something, which then meets no forward pass. The job waits
        until that thread comes by. Called by that thread, it is done at once."""
        self.go_on()
        if threading.current_thread() is not self._thread:
            return errand()
        done: Future[T] = Future()
        self._errand = Errand(errand, done)
        return done.result()

    def lend(self) -> None:
        """Do what the job wants done between two forward passes, if anything."""
        waiting, self._errand = self._errand, None
        if waiting is None:
            return
        try:
            waiting.outcome.set_result(waiting.work())
        except BaseException as error:
            waiting.outcome.set_exception(error)

    def wait(self, seconds: float) -> bool:
        """Let the server wait for the job, at most this long, and lend it its thread. Whether the job is over."""
        deadline = time.monotonic() + seconds
        while self._busy.locked() and time.monotonic() < deadline:
            self.lend()
            time.sleep(NAP)
        return not self._busy.locked()

    def _run(self, job: Callable[[], None], busy: threading.Lock) -> None:
        try:
            cores.move(cores.allowed())
            self._on_start()
            job()
        finally:
            self._end(busy)

    def _end(self, busy: threading.Lock) -> None:
        if busy is self._busy:
            self._job = self._thread = None
        busy.release()
