"""README and docs name what is there: imports, links, files, errors; tests/test_doc_blocks.py runs their code."""

import re

import pytest
from doc_blocks import BLOCKS, PAGES, REPOSITORY

from deltawire import errors

IMPORTS = sorted(
    {line for page in PAGES for line in re.findall(r"^from deltawire\S* import \w+", page.read_text(), re.M)}
)
WRITTEN = [*PAGES, *(REPOSITORY / name for name in ("SECURITY.md", "CHANGELOG.md", "LOG.md", "benchmarks/RESULTS.md"))]
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.M | re.S)
LINKS = [
    (page.relative_to(REPOSITORY).as_posix(), link)
    for page in WRITTEN
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", CODE.sub("", page.read_text()))
    if "://" not in link
]
FILES = re.compile(r"`((?:tests|src|benchmarks|examples|findings|docs|scripts)/[\w./-]*\w)[`/]")
RUNBOOK = REPOSITORY / "docs" / "OPERATIONS.md"


def test_the_readme_has_code_that_runs():
    assert [block for block in BLOCKS if block.page == "README.md" and not block.kind and block.language == "python"]


@pytest.mark.parametrize("line", IMPORTS)
def test_what_the_readme_imports_is_there(line):
    exec(line, {})


def test_the_pages_import_from_every_integration():
    modules = {line.split()[1] for line in IMPORTS}
    assert {f"deltawire.trainers.{name}" for name in ("conversion", "hook", "transformers", "trl")} <= modules


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_to_a_file(page, link):
    assert (REPOSITORY / page).parent.joinpath(link).exists()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_a_file_that_a_page_names_is_there(page):
    named = set(FILES.findall(page.read_text()))
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_the_tests_of_each_invariant_are_there():
    named = re.findall(r"`(\w+(?:/\w+)*\.py)`", (REPOSITORY / "docs" / "DESIGN.md").read_text())
    tests = [name.removeprefix("tests/") for name in named if name.rpartition("/")[2].startswith("test_")]
    assert len(tests) > 10 and not [name for name in tests if not (REPOSITORY / "tests" / name).exists()]


def test_the_index_names_every_page():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    pages = {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_the_runbook_says_what_to_do_about_every_error():
    """Each class of the tree, with its meaning and a remedy; the kinds that only group others have a heading."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    groups = {"DeltaWireError", "ChainError", "ApplyError", "EngineError"}
    text = " ".join(RUNBOOK.read_text().split())
    said = set(re.findall(r"- `(\w+)`(?: itself)?: [^*]+?\*Do:\* \w", text))
    assert said == kinds - groups
    assert all(f"(`{name}`)" in text for name in groups - {"DeltaWireError"})
