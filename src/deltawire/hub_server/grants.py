"""Permissions to upload a xorb in two steps, and what has arrived for each: kept in memory, forgotten at a restart."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltawire.errors import NotFound

LIFETIME_SECONDS = 3600.0
MAX_OPEN = 4096
"""far more than clients upload at once; who lost one asks again"""


@dataclass
class _Grant:
    xorb: bytes
    expires: float
    staged: Path | None = None


class Grants:
    """Thread-safe. A staged file belongs to its grant until `take` hands it over."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}

    def issue(self, xorb: bytes) -> str:
        """A new grant's id. Grants that expired, and the oldest of too many, go with what was staged for them."""
        now = self._clock()
        with self._lock:
            while self._grants:  # in the order in which they expire
                oldest, grant = next(iter(self._grants.items()))
                if grant.expires > now and len(self._grants) < MAX_OPEN:
                    break
                del self._grants[oldest]
                _discard(grant.staged)
            grant_id = secrets.token_hex(16)
            self._grants[grant_id] = _Grant(xorb, now + LIFETIME_SECONDS)
        return grant_id

    def check(self, grant_id: str) -> None:
        """Raise NotFound unless the grant is open."""
        with self._lock:
            self._open(grant_id)

    def stage(self, grant_id: str, staged: Path) -> None:
        """Hold a received body for a grant, in place of an earlier one. Raises NotFound, and then drops the file."""
        with self._lock:
            try:
                grant = self._open(grant_id)
            except NotFound:
                _discard(staged)
                raise
            _discard(grant.staged)
            grant.staged = staged

    def take(self, grant_id: str, xorb: bytes) -> Path:
        """Close a grant and hand over its body. Raises NotFound if it is not open, for another xorb, or has no body."""
        with self._lock:
            grant = self._open(grant_id)
            if grant.xorb != xorb or grant.staged is None:
                raise NotFound(f"grant {grant_id} has no upload of this xorb; ask for a new grant")
            del self._grants[grant_id]
            return grant.staged

    def _open(self, grant_id: str) -> _Grant:
        grant = self._grants.get(grant_id)
        if grant is None:
            raise NotFound("this grant is unknown or used up; ask for a new one")
        return grant


def _discard(staged: Path | None) -> None:
    if staged is not None:
        staged.unlink(missing_ok=True)
