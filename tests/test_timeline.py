"""A gap between tokens is laid at the door of what went on meanwhile."""

import pytest
from timeline import Span, covered, during, longest, of_update


def test_what_went_on_during_a_gap_is_said_with_its_share_the_longest_first():
    spans = [Span("publish", 0.0, 1.1), Span("pause", 1.3, 1.5), Span("pause", 5.0, 6.0)]
    assert during(Span("gap", 1.0, 2.0), spans) == "700 ms of nothing known, 200 ms of pause, 100 ms of publish"


def test_what_overlaps_is_covered_once():
    assert covered([Span("a", 0, 2), Span("b", 1, 3), Span("c", 5, 6), Span("d", 5, 5.5)]) == pytest.approx(4)
    assert during(Span("gap", 0, 1), [Span("a", -1, 3), Span("b", 0, 1)]) == "1000 ms of b, 1000 ms of a"


def test_the_longest_gap_is_found_and_none_where_there_are_none():
    assert longest([Span("gap", 0, 1), Span("gap", 5, 7), Span("gap", 8, 9)]) == Span("gap", 5, 7)
    assert longest([]) is None


def test_an_update_is_laid_back_from_when_its_report_was_seen():
    spans = of_update({"pause_ms": 50.0, "stage_s": 0.2, "fetch_s": 0.1}, seen=10.0)
    assert [(span.what, round(span.start, 3), round(span.end, 3)) for span in spans] == [
        ("fetch", 9.65, 9.75),
        ("stage", 9.75, 9.95),
        ("pause", 9.95, 10.0),
    ]
