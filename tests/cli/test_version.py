"""`deltawire --version` says which package this is and which formats it reads; each number stands in one place."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from runs import model, publish_all
from verbs import run_verb

import deltawire
from deltawire import open_bucket
from deltawire.errors import UnknownVersion
from deltawire.format import container, delta_file
from deltawire.live import rpc
from deltawire.runlog import records

ROOT = Path(__file__).parents[2]


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "deltawire.__version__"}
    said = [path for path in (ROOT / "src").rglob("*.py") if re.search(r"^__version__ =", path.read_text(), re.M)]
    assert said == [ROOT / "src" / "deltawire" / "__init__.py"]


def test_the_version_names_every_format():
    lines = run_verb("--version").stdout.splitlines()
    assert lines[0] == f"deltawire {deltawire.__version__}"
    assert "delta file      writes format 1 or 2, reads 1 or 2" in lines
    assert "run.json        writes format 1 or 2 or 3, reads 1 or 2 or 3" in lines
    assert "commit          writes format 1, reads 1" in lines


def test_the_formats_that_are_named_are_those_written_and_read(tmp_path):
    told = json.loads(run_verb("--version", "--json").stdout)
    formats = {known["object"]: known for known in told["formats"]}
    url = (tmp_path / "bucket").as_uri()
    publish_all(open_bucket(url, create=True), model(0), model(1))
    (run,) = tmp_path.glob("bucket/runs/*/run.json")
    (delta,) = tmp_path.glob("bucket/runs/*/deltas/*")
    (commit, *_) = tmp_path.glob("bucket/runs/*/commits/*")
    written = {
        "run.json": json.loads(run.read_bytes())["format"],
        "commit": json.loads(commit.read_bytes())["format"],
        "HEAD.json": json.loads((tmp_path / "bucket" / "HEAD.json").read_bytes())["format"],
        "delta file": int(container.read_header(delta.read_bytes()).metadata["version"]),
    }
    assert all(number in formats[name]["writes"] for name, number in written.items())
    assert {name: known["reads"] for name, known in formats.items()} == {
        "delta file": [1, 2], "run.json": [1, 2, 3], "commit": [1], "fold or anchor": [1], "HEAD.json": [1],
    }  # fmt: skip
    assert (told["version"], told["codecs"]) == (deltawire.__version__, list(delta_file.CODECS))
    assert told["protocol"] == rpc.PROTOCOL


@pytest.mark.parametrize("kind", [records.Run, records.Commit, records.Derived, records.Head])
def test_a_format_that_is_not_named_is_refused(kind):
    unknown = max(records.formats_of(kind)) + 1
    with pytest.raises(UnknownVersion, match=f"format {unknown}; this deltawire reads format"):
        records.read(kind, b'{"format": %d}' % unknown, where="a record")


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "log", "memory://"]])
def test_json_without_a_verb_or_version_says_where_it_belongs(arguments):
    assert "beside --version" in run_verb(*arguments, code=2).stderr
