"""Upload trouble in Python's log: when it begins or changes, every minute while it lasts, and when it is over."""

import logging
import time
from collections.abc import Callable

LOG = logging.getLogger("deltawire")
SAY_AGAIN = 60.0
"""seconds"""


class Trouble:
    """What the log says of one publisher's uploads; `where` names its bucket."""

    def __init__(self, where: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._where, self._clock = where, clock
        self._kind: type[Exception] | None = None
        self._since = self._said = 0.0

    def failed(self, error: Exception) -> None:
        """A try failed; the version is kept, and tried again."""
        now, new = self._clock(), type(error) is not self._kind
        if self._kind is None:
            self._since = now
        if new or now >= self._said + SAY_AGAIN:
            self._kind, self._said = type(error), now
            lasted = f" for {now - self._since:.0f} s" if now > self._since else ""
            LOG.warning(
                "%s: upload fails%s, and is tried again: %s: %s", self._where, lasted, self._kind.__name__, error
            )

    def over(self) -> None:
        """A version is durable."""
        if self._kind is not None:
            LOG.warning("%s: uploads again, after %.0f s", self._where, self._clock() - self._since)
        self._kind = None
