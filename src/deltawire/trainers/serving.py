"""Wait until a replica serves what was published: by followers' heartbeats, or by asking the vLLM servers."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire.buckets.base import Bucket, Stat
from deltawire.errors import EngineError, EngineUnsupported, NotServed, Unavailable
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.records import Position

if TYPE_CHECKING:
    from deltawire.vllm.client import EngineClient

ASK_ENGINE_EVERY = 0.1
"""seconds; a look at a server costs it one small request"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one replica was seen to serve (None: no version of any run), and what else it says of itself."""

    who: str
    run: str | None = None
    version: int | None = None
    note: str = ""

    def __str__(self) -> str:
        serves = "no version" if self.version is None else f"{_plain(str(self.run), 100)}:{self.version}"
        return f"{self.who}: {serves}{self.note}"


Look = Callable[[], list[Seen]]


def wait_until_served(look: Look, target: Position, *, timeout: float, poll: float, where: str) -> Seen:
    """The first replica seen to serve `target`, or a newer version of its run. `poll` is seconds between looks.

    Raises NotServed after `timeout` seconds, saying what was seen; what `look` raises.
    """
    deadline = time.monotonic() + timeout
    while True:
        seen = look()
        for replica in seen:
            if replica.run == target.run and replica.version is not None and replica.version >= target.version:
                return replica
        if (left := deadline - time.monotonic()) <= 0:
            found = "; ".join(map(str, seen)) or "no replica was seen at all"
            raise NotServed(
                f"{where}: after {timeout:.3g} s no replica serves {target}, which is committed and stays. Seen "
                f"serving: {found}. Is `deltawire follow --bucket {where} --engine URL` running? See its output; one "
                "that may not write the bucket keeps no heartbeat, so name its server in engine_urls"
            )
        time.sleep(min(poll, left))


def heartbeats_look(bucket: Bucket) -> Look:
    """Looks at the heartbeats that followers write; each is fetched only when it changed."""
    known: list[tuple[Stat, Heartbeat]] = []

    def look() -> list[Seen]:
        try:
            known[:] = heartbeats.read_all(bucket, known)
        except Unavailable as error:
            return [Seen("the heartbeats", note=f" ({error})")]
        return [Seen(_plain(beat.replica, 100), beat.run, beat.version, _note(beat)) for _, beat in known]

    return look


def engine_look(engines: Sequence["EngineClient"]) -> Look:
    """Asks each vLLM server which version it serves. Raises EngineUnsupported for one that never will."""

    def look() -> list[Seen]:
        return [ask(engine) for engine in engines]

    def ask(engine: "EngineClient") -> Seen:
        try:
            label = engine.weight_version()
        except EngineUnsupported:
            raise
        except EngineError as error:
            return Seen(engine.url, note=f" ({error})")
        run, _, version = label.rpartition(":")
        return Seen(engine.url, run, int(version)) if version.isdecimal() else Seen(engine.url, note=f" ({label!r})")

    return look


def _note(beat: Heartbeat) -> str:
    error = None if beat.error is None else _plain(beat.error, 300)
    said: Iterable[tuple[str, object]] = (("lag", beat.lag), ("staged", beat.staged), ("last error", error))
    notes = ", ".join(f"{name} {value}" for name, value in said if value is not None)
    return f" ({notes})" if notes else ""


def _plain(text: str, limit: int) -> str:
    """What anyone who may write the bucket may have written, fit for a terminal."""
    return ascii(text)[1:-1][:limit]
