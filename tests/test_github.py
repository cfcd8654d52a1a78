"""What GitHub reads: workflows and forms that fit its schemas, and steps that exist here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
GITHUB = REPOSITORY / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
CHECKED = {
    "vendor.github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "custom.github-workflows-require-timeout": sorted((GITHUB / "workflows").glob("*.yml")),
    "vendor.github-issue-forms": FORMS,
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
}


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("schema", CHECKED)
def test_what_github_reads_fits_its_schema(schema):
    assert CHECKED[schema]
    done = check(schema, *CHECKED[schema])
    assert done.returncode == 0, done.stdout


def test_a_workflow_that_github_would_refuse_is_found(tmp_path):
    text = (GITHUB / "workflows" / "ci.yml").read_text()
    (tmp_path / "ci.yml").write_text(text.replace("runs-on:", "run-on:"))
    assert check("vendor.github-workflows", tmp_path / "ci.yml").returncode == 1


def test_every_step_runs_something_that_is_here():
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    ran = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ran == [".ci/run", "make nightly"]
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    called = re.findall(r"^make ([a-z-]+)$", (REPOSITORY / ".ci" / "run").read_text(), re.M)
    assert {"nightly", *called} <= targets
    assert {"lint", "types", "docs", "test"} <= set(called)
