"""A compactor that works beside something else, on a thread of its own."""

import threading
from collections.abc import Callable

from deltawire.errors import DeltaWireError
from deltawire.upkeep.compactor import Compactor, CompactReport


class BackgroundCompactor:
    """Compacts on a thread of its own whenever it is woken, so that its waker never waits.

    Owns the compactor. What fails is given to `on_problem` and tried again the next time.
    """

    def __init__(
        self,
        compactor: Compactor,
        *,
        on_report: Callable[[CompactReport], None] = lambda report: None,
        on_problem: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._compactor, self._on_report, self._on_problem = compactor, on_report, on_problem
        self._woken, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="deltawire-compact", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BackgroundCompactor":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wake(self) -> None:
        """Something new was published."""
        self._woken.set()

    def close(self) -> None:
        """Finish the step under way and let go of the mirror."""
        self._closing = True
        self._woken.set()
        self._thread.join()
        self._compactor.close()

    def _run(self) -> None:
        while True:
            self._woken.wait()
            self._woken.clear()
            if self._closing:
                return
            try:
                for report in self._compactor.step():
                    self._on_report(report)
            except DeltaWireError as error:
                self._on_problem(error)
