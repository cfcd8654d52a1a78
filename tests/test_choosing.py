"""The table of docs/CHOOSING.md is its formula: 1.3 bytes for a changed weight against 2 bytes for every weight."""

import re
from pathlib import Path

ROW = re.compile(r"^\| ([\d.]+) % \| (\d[\d.]*) MB \| (\d+) GB \| (\d+) Gbit/s \|$", re.M)
WEIGHTS = 7e9


def test_the_table_says_what_the_formula_gives():
    rows = ROW.findall((Path(__file__).parents[1] / "docs" / "CHOOSING.md").read_text())
    assert len(rows) == 4
    for percent, delta, full, fabric in rows:
        share = float(percent) / 100
        assert float(delta) == round(1.3 * share * WEIGHTS / 1e6, 1)
        assert float(full) == 2 * WEIGHTS / 1e9
        assert int(fabric) == round(2 / (1.3 * share))
