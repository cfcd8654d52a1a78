"""Decoded changes that a copy was moved by, and that cannot be decoded again from where it stands: they lead back."""

from collections.abc import Mapping
from threading import Lock

from deltawire.weights.delta import Delta
from deltawire.weights.kept import KeptParts

HELD = 1 << 29
"""bytes of decoded changes that one reader holds, and that one update under way may add to them"""


class HeldChanges:
    """Changes by the key of their record, each with that record's hash. The oldest go where all take more than `HELD`
    bytes. Any thread may call it.

    `kept` says what of each tensor a change is of. One that is of other parts, or of the whole, is not found.
    """

    def __init__(self) -> None:
        self._changes: dict[str, tuple[str, Delta, KeptParts | None]] = {}
        self._lock = Lock()

    def keep(self, decoded: Mapping[str, tuple[str, Delta]], kept: KeptParts | None = None) -> None:
        """Hold these, the newest first."""
        with self._lock:
            for key, (record_hash, change) in [*decoded.items()][::-1]:
                self._changes.pop(key, None)
                self._changes[key] = record_hash, change, kept
            while self._changes and sum(change.nbytes for _, change, _ in self._changes.values()) > HELD:
                del self._changes[next(iter(self._changes))]

    def keys(self, kept: KeptParts | None = None) -> frozenset[str]:
        """The records whose changes are held."""
        with self._lock:
            return frozenset(key for key, (_, _, parts) in self._changes.items() if parts is kept)

    def find(self, key: str, record_hash: str, kept: KeptParts | None = None) -> Delta | None:
        """The change of a record; None where it is not held. One of another record that lay under its key is let
        go."""
        with self._lock:
            held, change, parts = self._changes.get(key, (record_hash, None, kept))
            if held != record_hash:
                del self._changes[key]
                return None
        return change if parts is kept else None
