"""The README and its pages: their Python runs where it needs no model, and imports and links lead somewhere."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCKS = re.findall(r"<!-- tested by [^>]*-->\n```python\n(.*?)```", README.read_text(), re.S)
IMPORTS = sorted(
    {line for page in PAGES for line in re.findall(r"^from deltawire\S* import \w+", page.read_text(), re.M)}
)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)
LINKS = [
    (page.relative_to(REPOSITORY).as_posix(), link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", CODE.sub("", page.read_text()))
    if "://" not in link
]


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_the_code_in_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_tested_code():
    assert BLOCKS


@pytest.mark.parametrize("line", IMPORTS)
def test_what_the_readme_imports_is_there(line):
    exec(line, {})


def test_the_pages_import_from_every_integration():
    modules = {line.split()[1] for line in IMPORTS}
    assert {f"deltawire.trainers.{name}" for name in ("conversion", "hook", "transformers", "trl")} <= modules


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_to_a_file(page, link):
    assert (REPOSITORY / page).parent.joinpath(link).exists()
