"""The constants of a forecast are those of benchmarks/RESULTS.md, read from its tables."""

import re
from pathlib import Path

import pytest

from deltawire.sizing import constants as measured
from deltawire.sizing.scenario import bytes_a_change

RESULTS = (Path(__file__).parents[2] / "benchmarks" / "RESULTS.md").read_text()


def section(name: str) -> str:
    """The first block of figures of a benchmark."""
    (found,) = re.findall(rf"^## {re.escape(name)}\n.*?```\n(.*?)```", RESULTS, re.M | re.S)
    return found


def numbers(text: str, pattern: str) -> list[tuple[float, ...]]:
    found = [match.groups() for match in re.finditer(pattern, text)]
    assert found, pattern
    return [tuple(float(value.replace(",", "")) for value in row) for row in found]


PAUSES = numbers(
    section("vllm_pause.py"),
    r"([\d.]+)% changed \(([\d,]+) weights, ([\d.]+) MB\): .*? pause ([\d.]+) ms .*?served (\d+) ms",
)
"""percent, weights, megabytes, pause and time to served of each row"""


def slope(column: int) -> tuple[float, float]:
    """Seconds a change between the first row and the last, and where that line begins."""
    first, last = PAUSES[0], PAUSES[-1]
    each = (last[column] - first[column]) / 1e3 / (last[1] - first[1])
    return each, first[column] / 1e3 - each * first[1]


def test_a_pause_and_a_stage_are_the_line_through_the_measured_rows():
    pause, begins = slope(3)
    assert pytest.approx(pause, rel=0.05) == measured.PAUSE_SECONDS_A_CHANGE
    assert pytest.approx(begins, rel=0.05) == measured.PAUSE_SECONDS
    stage, begins = slope(4)
    assert pytest.approx(stage, rel=0.05) == measured.STAGE_SECONDS_A_CHANGE
    assert pytest.approx(begins, rel=0.05) == measured.STAGE_SECONDS


def test_a_reload_is_the_measured_one():
    ((milliseconds,),) = numbers(section("vllm_pause.py"), r"full reload from disk: (\d+) ms")
    assert pytest.approx(2 * 596_049_920 / (milliseconds / 1e3), rel=0.01) == measured.RELOAD_BYTES_PER_SECOND


def test_bytes_of_a_change_are_the_measured_ones():
    codecs = RESULTS.partition("\n## codecs.py\n")[2].partition("\n## ")[0]
    recorded = r"([\d.]+)% changed(?: a step)?\n(?:.*\n)*?deltawire subset +([\d.]+)"
    there = {share / 100: each for share, each in numbers(codecs, recorded)}
    row = r"(?:adapter|whole model) +\S+ +([\d,]+) +([\d.]+)% +([\d,]+) B"
    for elements, share, size in numbers(section("adapter_bytes.py"), row):
        there[share / 100] = size / (share / 100 * elements)
    assert len(measured.BYTES_A_CHANGE) == 5
    for share, each in measured.BYTES_A_CHANGE:
        assert each == pytest.approx(there[share], abs=0.03)
        assert bytes_a_change(share) == pytest.approx(each)


def test_a_publish_is_the_line_through_the_measured_rows():
    rows = numbers(section("publish.py"), r"([\d.]+)% of ([\d,]+) changed: ([\d.]+) s, ([\d.]+) GB/s")
    (low, elements, first, speed), (high, _, last, _) = rows[0], rows[-1]
    each = (last - first) / ((high - low) / 100 * elements)
    assert speed * 1e9 == measured.PUBLISH_BYTES_PER_SECOND
    assert pytest.approx(each, rel=0.05) == measured.PUBLISH_SECONDS_A_CHANGE


@pytest.mark.parametrize(
    ("what", "constant"),
    [
        ("a version, by its trainer", measured.TRAINER_REQUESTS),
        ("one version, by a reader", measured.READER_REQUESTS),
        ("a look where nothing is new", measured.LOOK_REQUESTS),
        ("a heartbeat", measured.HEARTBEAT_REQUESTS),
    ],
)
def test_requests_are_the_counted_ones(what, constant):
    ((api,),) = numbers(section("hub_requests.py"), rf"(?m)^{what}: ([\d.]+) API")
    assert api == constant
