"""When things happened, in seconds of one clock, and during which of them a span of time fell."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """From `start` to `end`; `what` went on meanwhile."""

    what: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def longest(gaps: Iterable[Span]) -> Span | None:
    """The longest of these, None where there are none."""
    return max(gaps, key=lambda gap: gap.seconds, default=None)


def during(gap: Span, spans: Iterable[Span]) -> str:
    """What went on during a gap, the longest first: "212 ms of pause, 40 ms of stage, 3 ms of nothing known"."""
    shared: dict[str, float] = {}
    inside = [Span(span.what, max(span.start, gap.start), min(span.end, gap.end)) for span in spans]
    inside = [span for span in inside if span.seconds > 0]
    for span in inside:
        shared[span.what] = shared.get(span.what, 0.0) + span.seconds
    shared["nothing known"] = gap.seconds - covered(inside)
    parts = sorted(((seconds, what) for what, seconds in shared.items() if seconds > 0), reverse=True)
    return ", ".join(f"{1e3 * seconds:.0f} ms of {what}" for seconds, what in parts)


def covered(spans: Sequence[Span]) -> float:
    """Seconds in which any of these went on."""
    total, upto = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, upto))
        upto = max(upto, span.end)
    return total


def of_update(report: dict[str, float], seen: float) -> list[Span]:
    """When an update was fetched, staged and written, of the report that its follower printed at `seen`. The follower
    prints it when the server has resumed; between staging and pausing it waits for the worker to say that it is done.
    """
    pause = Span("pause", seen - report["pause_ms"] / 1e3, seen)
    stage = Span("stage", pause.start - report["stage_s"], pause.start)
    return [Span("fetch", stage.start - report["fetch_s"], stage.start), stage, pause]
