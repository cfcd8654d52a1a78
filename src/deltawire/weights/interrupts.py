"""What a signal's handler raises while a Numba kernel hands its arrays over, as the handler raised it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_raised() -> Iterator[None]:
    """Have a KeyboardInterrupt, or what a watchdog's handler raised, leave this block as itself.

    A kernel may return several results at once. What is raised while Numba makes an array of one of them arrives as a
    SystemError, or several, each the cause of the next (seen in 0.65 and 0.68); no caller's handler expects that.
    """
    try:
        yield
    except SystemError as error:
        raise _first_cause(error) from None


def _first_cause(error: BaseException) -> BaseException:
    cause = error.__cause__
    return _first_cause(cause) if isinstance(error, SystemError) and cause is not None else error
