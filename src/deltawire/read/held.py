"""Decoded changes that a copy was moved by, and that cannot be decoded again from where it stands: they lead back."""

from collections.abc import Mapping
from threading import Lock

from deltawire.weights.delta import Delta

HELD = 1 << 29
"""bytes of decoded changes that one reader holds, and that one update under way may add to them"""


class HeldChanges:
    """Changes by the key of their record, each with that record's hash. The oldest go where all take more than `HELD`
    bytes. Any thread may call it."""

    def __init__(self) -> None:
        self._changes: dict[str, tuple[str, Delta]] = {}
        self._lock = Lock()

    def keep(self, decoded: Mapping[str, tuple[str, Delta]]) -> None:
        """Hold these, the newest first."""
        with self._lock:
            for key, found in [*decoded.items()][::-1]:
                self._changes.pop(key, None)
                self._changes[key] = found
            while self._changes and sum(change.nbytes for _, change in self._changes.values()) > HELD:
                del self._changes[next(iter(self._changes))]

    def keys(self) -> frozenset[str]:
        """The records whose changes are held."""
        with self._lock:
            return frozenset(self._changes)

    def find(self, key: str, record_hash: str) -> Delta | None:
        """The change of a record; None where it is not held. One of another record that lay under its key is let
        go."""
        with self._lock:
            held, change = self._changes.get(key, (record_hash, None))
            if held != record_hash:
                del self._changes[key]
                return None
        return change
