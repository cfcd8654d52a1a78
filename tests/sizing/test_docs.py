"""docs/SIZING.md: its commands run, and its table is what they say."""

import re
import shlex
from pathlib import Path

import pytest
from verbs import records, say

from deltawire.sizing.constants import HUB_LIMITS

PAGE = (Path(__file__).parents[2] / "docs" / "SIZING.md").read_text()
COMMANDS = re.findall(r"^deltawire (plan [^#\n]*)", PAGE, re.M)
ROW = re.compile(
    r"^\| ([\d.]+[BT]) \| ([\d.]+) ([GT]B) \| ([\d.]+) % \| ([\d.]+) ([MG]B) \| ([\d.]+) ([MG]B) \|$", re.M
)
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command):
    assert say(*shlex.split(command))


def test_the_page_has_commands():
    assert len(COMMANDS) == 5


@pytest.mark.parametrize("row", ROW.findall(PAGE), ids=lambda row: f"{row[0]} at {row[3]} %")
def test_the_table_is_what_the_command_says(row):
    model, whole, whole_unit, percent, post, post_unit, ours, our_unit = row
    density = ("--density", float(percent) / 100)
    each = 6 if model == "0.6B" else 1.543
    (theirs,), (found,) = records("plan", model, *density, "--bytes-a-change", each), records("plan", model, *density)
    assert theirs["checkpoint_bytes"] == pytest.approx(float(whole) * UNITS[whole_unit], rel=0.01)
    assert theirs["delta_bytes"] == pytest.approx(float(post) * UNITS[post_unit], rel=0.01)
    assert found["delta_bytes"] == pytest.approx(float(ours) * UNITS[our_unit], rel=0.01)


def test_the_table_and_the_limits_are_there():
    assert len(ROW.findall(PAGE)) == 5
    assert all(f"{limit:,}" in PAGE for limit in HUB_LIMITS.values())
