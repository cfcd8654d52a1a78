"""Requests that a server streams answers to, from a process of their own, and when each token came."""

import statistics
import sys
from urllib.parse import urlsplit

from programs import program
from timeline import Span
from waiting import until

from deltawire.demo.processes import Child, Children, Command


class TokenLoad:
    """`streams` clients that each ask for `length` sampled tokens, again and again, as long as `children` live. They
    run beside this process: what it computes keeps no token waiting."""

    def __init__(self, children: Children, url: str, streams: int, *, length: int = 256) -> None:
        address = urlsplit(url)
        arguments = (str(address.hostname), str(address.port), str(streams), str(length))
        command = Command("clients", (sys.executable, program("stream_tokens"), *arguments))
        self._child: Child = children.start(command)
        self._arrivals: list[float] = []
        self._gaps: list[Span] = []
        self._until = 0.0

    def wait(self) -> None:
        """Until the first token comes."""
        until(lambda: self._look() and self._arrivals)

    def rate(self, start: float, end: float) -> float:
        """Tokens a second between two times, the later of them not in the future."""
        self._know_until(end)
        return sum(start <= at < end for at in self._arrivals) / (end - start)

    def gaps(self, start: float, end: float) -> list[Span]:
        """From one token of an answer to the next, of those that end between two times."""
        self._know_until(end)
        return [gap for gap in self._gaps if start <= gap.end < end]

    def stop(self) -> None:
        """Ask for no more tokens."""
        self._child.close()

    def _know_until(self, when: float) -> None:
        until(lambda: self._look() and self._until >= when)

    def _look(self) -> bool:
        """Take in what the clients printed since the last look."""
        for record in self._child.output.records():
            assert "failed" not in record, f"a request failed under load: {record}"
            self._until = float(record["until"])
            for last, now in record["gaps"]:
                self._arrivals.append(now)
                if last is not None:
                    self._gaps.append(Span("gap", last, now))
        assert self._child.code is None, "the clients ended"
        return True


def told(gaps: list[Span]) -> str:
    """The usual gap between tokens, and long ones."""
    times = sorted(1e3 * gap.seconds for gap in gaps)
    if not times:
        return "no gap between tokens"
    late = times[int(0.99 * len(times))]
    return f"gap between tokens p50 {statistics.median(times):.1f}, p99 {late:.1f}, longest {times[-1]:.0f} ms"
