"""A bucket that fails when its plan says so: before a write has an effect, or after, when only its answer is lost."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltawire.buckets import Bucket
from deltawire.errors import BucketError, Unavailable


@dataclass(frozen=True)
class Fault:
    """What a write raises, and whether the bytes have arrived by then."""

    error: Exception
    after: bool = False


Plan = Callable[[int, str], Fault | None]
"""(how many writes came before, key) -> what goes wrong; it may block, too"""


def never(n: int, key: str) -> None:
    """Nothing goes wrong."""


def on_key(part: str, *, times: int = 1, after: bool = False, error: BucketError | None = None) -> Plan:
    """The first `times` writes to keys that contain `part` fail."""
    left = [times]

    def plan(n: int, key: str) -> Fault | None:
        if part not in key or left[0] == 0:
            return None
        left[0] -= 1
        return Fault(error or Unavailable(f"planned for {key}"), after)

    return plan


def from_write(n: int, *, after: bool = False) -> Plan:
    """Write number `n` fails, and every later one never arrives: what a killed writer leaves."""
    dead = Unavailable("the writer is dead")
    return lambda number, key: None if number < n else Fault(dead, after and number == n)


def down(error: BucketError | None = None) -> tuple[Plan, threading.Event]:
    """A store that fails every write; an event says when it was first asked."""
    asked = threading.Event()

    def plan(n: int, key: str) -> Fault:
        asked.set()
        return Fault(error or Unavailable("the store is down"))

    return plan, asked


class Faulty:
    """`bucket` under a plan, which a test may exchange at any time. `asked` are the writes tried, with their bytes;
    `done` the keys that arrived, in order."""

    def __init__(self, bucket: Bucket, plan: Plan = never) -> None:
        self._bucket, self.plan = bucket, plan
        self.asked: list[tuple[str, bytes]] = []
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket, name)

    def put(self, key: str, data: bytes | Path) -> None:
        self._write(key, data, self._bucket.put)

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._write(key, data, self._bucket.put_new)

    def _write(self, key: str, data: bytes | Path, send: Callable[[str, bytes | Path], None]) -> None:
        number = len(self.asked)
        self.asked.append((key, data.read_bytes() if isinstance(data, Path) else data))
        fault = self.plan(number, key)
        if fault is not None and not fault.after:
            raise fault.error
        send(key, data)
        self.done.append(key)
        if fault is not None:
            raise fault.error

    def sent(self, part: str) -> list[bytes]:
        """The bytes of every try to write a key that contains `part`."""
        return [data for key, data in self.asked if part in key]
