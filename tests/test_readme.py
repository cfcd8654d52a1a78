"""The README's Python that needs no model runs as it stands."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"<!-- tested by [^>]*-->\n```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S
)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_the_code_in_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_tested_code():
    assert BLOCKS
