"""One rule: the bucket is the first argument, else what --bucket says, else DELTAWIRE_BUCKET."""

import json

import pytest
from runs import chain_of_four
from typer.testing import CliRunner
from verbs import say

from deltawire.cli import app

READS = [
    ["log", "--json"],
    ["status", "--json"],
    ["verify", "--json"],
    ["compact", "--json"],
    ["prune", "--json"],
    ["tag", "--json"],
    ["tag", "1", "good", "--json"],
    ["tag", "--delete", "there", "--json"],
    ["diff", "0", "2", "--json"],
    ["doctor", "--read-only", "--json"],
    ["materialize", "OUT", "--json"],
    ["export", "OUT", "--json"],
]
GIVE = "--bucket or DELTAWIRE_BUCKET may name the bucket instead"


@pytest.fixture
def url():
    bucket, _ = chain_of_four()
    say("tag", bucket.url, 0, "there")
    return bucket.url


def shown(*arguments, **environ):
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "250", **environ})
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("how", ["argument", "option", "variable"])
@pytest.mark.parametrize("line", READS, ids=" ".join)
def test_each_verb_takes_its_bucket_in_each_way(url, tmp_path, line, how):
    verb, *rest = [str(tmp_path / "out") if word == "OUT" else word for word in line]
    if how == "argument":
        done = shown(verb, url, *rest)
    elif how == "option":
        done = shown(verb, *rest, "--bucket", url)
    else:
        done = shown(verb, *rest, DELTAWIRE_BUCKET=url)
    assert done[0] == 0, done
    for record in done[1].splitlines():
        json.loads(record)


def test_the_argument_goes_before_the_variable(url):
    assert "there" in say("tag", url, DELTAWIRE_BUCKET="memory://another")
    assert "there" in say("tag", "--bucket", url, DELTAWIRE_BUCKET="memory://another")


@pytest.mark.parametrize("line", READS, ids=" ".join)
def test_a_bucket_that_is_not_named_or_named_twice_is_refused_with_the_rule(url, tmp_path, line):
    verb, *rest = [str(tmp_path / "out") if word == "OUT" else word for word in line]
    code, _, said = shown(verb, url, *rest, "--bucket", "memory://another")
    assert code == 2 and "named twice" in said
    if verb != "diff":  # two folders are compared without one
        code, _, said = shown(verb, *rest)
        assert code == 2 and GIVE in said
    assert not (tmp_path / "out").exists()


def test_an_address_is_not_taken_for_the_folder_that_was_left_out(url):
    for verb, names in (("materialize", "BUCKET OUT"), ("export", "BUCKET OUT")):
        code, _, said = shown(verb, url, DELTAWIRE_BUCKET="memory://another")
        assert code == 2 and f"give {names}; {GIVE}" in said


def test_followers_and_imports_take_it_as_an_argument_too(url, tmp_path):
    say("export", url, tmp_path / "trl")
    told = say("import", tmp_path / "trl", "--bucket", (tmp_path / "again").as_uri())
    assert "4 files" in told and "again" in told
    code, said, _ = shown("follow", url, "--engine", "http://127.0.0.1:9", "--once")
    assert (code, f"follows {url}" in said) == (1, True)
