"""A worker that fails when it is about to do something."""

from collections.abc import Iterator
from contextlib import contextmanager

from deltawire.live.model import Moment
from deltawire.live.worker import LiveWorker


@contextmanager
def failing(worker: LiveWorker, moment: Moment, message: str) -> Iterator[None]:
    """Meanwhile this worker raises RuntimeError at that moment."""

    def before(about: Moment) -> None:
        if about == moment:
            raise RuntimeError(message)

    worker.before = before
    try:
        yield
    finally:
        del worker.before
