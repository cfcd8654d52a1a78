"""The README's Python that needs no model runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"<!-- tested by [^>]*-->\n```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_the_code_in_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_tested_code():
    assert BLOCKS


@pytest.mark.parametrize("line", re.findall(r"^from deltawire\S* import \w+", README, re.M))
def test_what_the_readme_imports_is_there(line):
    exec(line, {})
