"""A follower's side of the lease on a server: take it, renew it, and stop when another has it."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deltawire.errors import EngineError
from deltawire.follow.engine import Engine
from deltawire.follow.status import ServerStatus
from deltawire.live.lease import RENEW, this_follower

LOOK = 0.25
"""seconds between looks at the lease of a follower that may be gone"""


class ServerLease:
    """The right to drive one engine, for the follower that is `replica` of `bucket`. `take_over` takes it, the first
    time, from a follower that is well, too. `stopping` ends waiting."""

    def __init__(
        self, engine: Engine, replica: str, bucket: str, *, take_over: bool, stopping: threading.Event
    ) -> None:
        self.me = this_follower(replica, bucket)
        self._engine, self._take_over, self._stopping = engine, take_over, stopping
        self.held = False
        engine.token = secrets.token_hex(16)

    def status(self) -> ServerStatus | None:
        """The server's status once the lease is ours; None when `stopping` came first. The end of another's lease is
        waited for. Raises AnotherFollower when it is renewed meanwhile, or when another's was ours."""
        status = self._engine.status()
        first = status.lease
        while not (view := status.lease).mine:
            if self.held and view.holder is not None:
                raise view.refusal
            if view.is_free_for(self.me) or self._take_over:
                self.held = self._engine.take(self.me, view)
            elif view.turn != first.turn:
                raise view.refusal
            elif self._stopping.wait(LOOK):
                return None
            status = self._engine.status()
        self._take_over = False
        return status

    def confirmed(self) -> ServerStatus:
        """The server's status. Raises AnotherFollower when the lease is not ours any more."""
        status = self._engine.status()
        if not status.lease.mine:
            raise status.lease.refusal
        return status

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease, once it is ours, whatever a block waits for."""
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(done,), name="deltawire-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def release(self) -> None:
        """Let the next follower drive the engine at once."""
        if self.held:
            with suppress(EngineError):
                self._engine.release()
        self.held = False

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEW):
            if self.held:
                with suppress(EngineError, RuntimeError):  # the latter when our client is closed meanwhile
                    self._engine.status()
