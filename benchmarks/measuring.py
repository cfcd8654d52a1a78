"""What a codec takes: bytes a change, and its speed as a share of one pass of the same run that only compares."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from compare_pass import count_changed
from deltawire.weights.delta import Delta
from steps import Step

WAYS = ("encode", "decode", "publish")


class Codec(NamedTuple):
    """Encode gives bytes; decode gives the delta, or the new weights end to end. `publish` compares and encodes; None
    where encode does both."""

    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int] = len
    publish: Callable[[], Any] | None = None


class Timer:
    """Seconds of each kind of work, round by round."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._seconds = clock, dict[str, list[float]]()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it, and note how long it took."""
        started = self._clock()
        result = work()
        self._seconds.setdefault(name, []).append(self._clock() - started)
        return result

    def add(self, other: "Timer") -> None:
        """Take the rounds of another."""
        for name, seconds in other._seconds.items():
            self._seconds.setdefault(name, []).extend(seconds)

    def middle(self, name: str) -> float:
        """The median of the rounds."""
        return statistics.median(self._seconds[name])


def count(step: Step) -> None:
    """One compare pass."""
    for name, old in step.old.items():
        count_changed(old.data, step.new[name].data)


def measure(step: Step, codec: Codec, rounds: int, patience: float) -> dict[str, Any]:
    """Milliseconds of a compare pass; of the codec the bytes a change, the shares of one pass, and whether it is exact.
    CPU time, medians of `rounds`; after `patience` seconds no other begins."""
    timer, began, done = Timer(time.process_time), time.perf_counter(), 0
    while not done or (done < rounds and time.perf_counter() - began < patience):
        timer.time("compare pass", lambda: count(step))
        data = timer.time("encode", codec.encode)
        back = timer.time("decode", partial(codec.decode, data))
        timer.time("publish", codec.publish or codec.encode)
        done += 1
    seconds = timer.middle("compare pass")
    return {
        "bytes": codec.size(data) / step.delta.changed,
        **{way: seconds / timer.middle(way) for way in WAYS},
        "exact": back == step.delta if isinstance(back, Delta) else bool(np.array_equal(back, step.flat_new)),
        "compare_ms": 1e3 * seconds,
        "rounds": done,
    }
