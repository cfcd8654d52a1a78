"""A bucket that fails on schedule, around any bucket: for tests, and to see a fleet survive."""

import builtins
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deltawire.buckets.base import Bucket, Stat, bytes_of, fenced
from deltawire.buckets.forwarding import Forwarding
from deltawire.errors import Unavailable

Kind = Literal[
    "fail before", "fail after", "throttle", "truncate", "flip", "delay", "stale", "late duplicate", "partial"
]
"""
fail before: nothing happened. fail after: it happened, and the acknowledgement was lost. throttle: HTTP 429, nothing
happened. truncate, flip: what is read lacks its last byte, or has a bit turned. delay: it takes `seconds`. stale: a
read answers what this key or prefix answered at first. late duplicate: a write arrives a second time, after the next
write. partial: of several deletions only the first is done, and it fails.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a verb: its number, counted from 0 over the bucket's life, and its key (or prefix)."""

    number: int
    verb: str
    key: str


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one call. `seconds` is for a delay."""

    kind: Kind
    seconds: float = 0.0


RECORD = 64 << 10
"""bytes up to which an object is remembered to be read stale: HEAD and heartbeats, which alone are overwritten"""
Schedule = Callable[[Call], Fault | None]


def at(verb: str, part: str, kind: Kind, *, times: int = 1, seconds: float = 0.0) -> Schedule:
    """The first `times` calls of a verb whose key contains `part`."""
    left = [times]

    def schedule(call: Call) -> Fault | None:
        if call.verb != verb or part not in call.key or left[0] <= 0:
            return None
        left[0] -= 1
        return Fault(kind, seconds)

    return schedule


def seeded(seed: int, rate: float, *, seconds: float = 0.001) -> Schedule:
    """Faults of every kind that fits the verb, in a random `rate` of calls; the same seed gives the same faults."""
    draw = random.Random(seed)
    damaged: list[Kind] = ["fail before", "throttle", "truncate", "flip", "delay"]
    fetched: list[Kind] = [*damaged, "stale"]
    old: list[Kind] = ["fail before", "throttle", "delay", "stale"]
    written: list[Kind] = ["fail before", "fail after", "throttle", "delay", "late duplicate"]
    deleted: list[Kind] = ["fail before", "fail after", "throttle", "partial"]
    fitting = {"get": fetched, "get_file": damaged, "stat": old, "list": old, "put": written, "put_new": written}

    def schedule(call: Call) -> Fault | None:
        return Fault(draw.choice(fitting.get(call.verb, deleted)), seconds) if draw.random() < rate else None

    return schedule


@dataclass(slots=True)
class _Memory:
    """What was answered first, and the writes that will arrive again."""

    stats: dict[str, Stat] = field(default_factory=dict)
    lists: dict[str, list[Stat]] = field(default_factory=dict)
    records: dict[str, bytes] = field(default_factory=dict)
    late: builtins.list[Callable[[], None]] = field(default_factory=list)


class Faulty(Forwarding):
    """`bucket` under a schedule, which may be exchanged at any time. `injected` counts faults by kind."""

    def __init__(self, bucket: Bucket, schedule: Schedule, *, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(bucket)
        self.schedule, self._sleep = schedule, sleep
        self._memory, self._lock, self._calls = _Memory(), threading.Lock(), 0
        self.injected: Counter[str] = Counter()
        self._denied: bool | None = None

    @property
    def conditional_writes(self) -> bool:
        """That of the bucket inside; set it to False to play a store that has none."""
        return self._bucket.conditional_writes if self._denied is None else self._denied

    @conditional_writes.setter
    def conditional_writes(self, value: bool) -> None:
        self._denied = value

    def prove(self, folder: str) -> bool:
        return fenced(self._bucket, folder) if self._denied is None else self._denied

    def stat(self, key: str) -> Stat:
        fault = self._begin("stat", key)
        if fault == "stale" and key in self._memory.stats:
            return self._memory.stats[key]
        found = self._bucket.stat(key)
        self._memory.stats.setdefault(key, found)
        return found

    def get(self, key: str, *, limit: int) -> bytes:
        fault = self._begin("get", key)
        if fault == "stale" and key in self._memory.records:
            return self._memory.records[key]
        found = self._bucket.get(key, limit=limit)
        if len(found) <= RECORD:
            self._memory.records.setdefault(key, found)
        return _damaged(found, fault, self._calls)

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        fault = self._begin("get_file", key)
        self._bucket.get_file(key, path, limit=limit)
        if fault in ("truncate", "flip"):
            path.write_bytes(_damaged(path.read_bytes(), fault, self._calls))

    def put(self, key: str, data: bytes | Path) -> None:
        self._write("put", key, lambda: self._bucket.put(key, data), data)

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._write("put_new", key, lambda: self._bucket.put_new(key, data), data)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        fault = self._begin("list", prefix)
        if fault == "stale" and prefix in self._memory.lists:
            return (stat for stat in self._memory.lists[prefix] if stat.key > after)
        found = [*self._bucket.list(prefix, after=after)]
        if not after:
            self._memory.lists[prefix] = found
        return iter(found)

    def delete(self, *keys: str) -> None:
        fault = self._begin("delete", keys[0] if keys else "")
        self._bucket.delete(*(keys[:1] if fault == "partial" else keys))
        if fault in ("partial", "fail after"):
            raise Unavailable(f"{self.url}: injected: {fault}")

    def _write(self, verb: str, key: str, send: Callable[[], None], data: bytes | Path) -> None:
        fault = self._begin(verb, key)
        send()
        with self._lock:
            late, self._memory.late = self._memory.late, []
            if fault == "late duplicate" and not (verb == "put_new" and self.conditional_writes):
                frozen = bytes_of(data)
                self._memory.late = [lambda: self._bucket.put(key, frozen)]
        for arrive in late:
            arrive()
        if fault == "fail after":
            raise Unavailable(f"{self.url}/{key}: injected: the acknowledgement is lost")

    def _begin(self, verb: str, key: str) -> str | None:
        """What is to go wrong with a call; what fails at once fails here."""
        with self._lock:
            fault = self.schedule(Call(self._calls, verb, key))
            self._calls += 1
            if fault is None:
                return None
            self.injected[fault.kind] += 1
        if fault.kind == "delay":
            self._sleep(fault.seconds)
        if fault.kind in ("fail before", "throttle"):
            why = "HTTP 429, try later" if fault.kind == "throttle" else "no answer"
            raise Unavailable(f"{self.url}/{key}: injected: {why}")
        return fault.kind


def _damaged(data: bytes, fault: str | None, number: int) -> bytes:
    if fault == "truncate":
        return data[:-1]
    if fault == "flip" and data:
        place = 7919 * number % len(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    return data
