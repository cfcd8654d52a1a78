"""Names that strangers may have written, as the verbs print them; and arguments that nobody meant."""

import json

import numpy as np
import pytest
from runs import publishing
from typer.testing import CliRunner
from verbs import records, run_verb, say

import deltawire as dw
from deltawire.cli import app
from deltawire.errors import DeltaWireError

METRIC, CLEARS = "[/red]\x1b]0;owned\x07", "clears\x1b[2J\nversion 9: served"
TENSORS = ("[/bold]w.weight", "[red]v", "a\x1b[31mb", ":smile:")
MANY = "9" * 5000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder bucket whose tensors and metrics are named to be markup and escapes; its address."""
    url = (tmp_path_factory.mktemp("strange") / "bucket").as_uri()
    weights = {name: np.arange(9, dtype=np.float16) for name in TENSORS}
    with publishing(dw.open_bucket(url, create=True)) as publisher:
        for version in range(2):
            for tensor in weights.values():
                tensor[version] += 1
            publisher.publish(weights, metrics={METRIC: 1.0, CLEARS: 2.0})
            publisher.flush(20)
    return url


@pytest.mark.parametrize(
    "arguments",
    [
        ["log", "RUN"],
        ["log", "RUN", "--oneline"],
        ["log", "RUN", "--metric", METRIC],
        ["diff", "0", "1", "--bucket", "RUN"],
        ["diff", "0", "1", "--bucket", "RUN", "--tensors"],
        ["inspect", "DELTA"],
    ],
)
def test_what_strangers_named_is_text_on_a_terminal(run, arguments):
    delta = next(dw.open_bucket(run).root.glob("runs/*/deltas/*"))
    shown = say(*({"RUN": run, "DELTA": delta}.get(word, word) for word in arguments))
    assert "\x1b" not in shown and "\x07" not in shown
    assert not any(line.startswith("version 9") for line in shown.splitlines())
    if arguments[0] != "log":
        assert "[red]v" in shown and "a\\u001b[31mb" in shown
    elif "--metric" not in arguments:
        assert "[/red]\\u001b]0;owned\\u0007" in shown and "clears\\u001b[2J\\u000aversion 9: served" in shown


def test_an_error_that_names_what_strangers_named_is_one_line(run):
    done = run_verb("diff", "0", "best:none", "--bucket", run, code=1)
    assert done.stderr.startswith("deltawire: NotFound: ") and done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_json_says_a_name_as_it_is(run):
    assert records("log", run)[0]["metrics"] == {METRIC: 1.0, CLEARS: 2.0}
    assert json.loads(say("diff", "0", "1", "--bucket", run, "--tensors", "--json").splitlines()[0])["name"] in TENSORS


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff", MANY, "1", "--bucket", "RUN"],
        ["diff", "٣", "1", "--bucket", "RUN"],
        ["tag", MANY, "good", "--bucket", "RUN"],
        ["materialize", "RUN", "/nowhere/out", "--version", MANY],
        ["follow", "--bucket", "RUN", "--pin", MANY, "--once"],
        ["follow", "--bucket", "RUN", "--engine", "http://[", "--once"],
        ["follow", "--bucket", "RUN", "--engine", "http://127.0.0.1:1", "--health", MANY, "--once"],
        ["status", "RUN", "--serve", MANY],
        ["status", "RUN", "--serve", "٣"],
        ["inspect", "--engine", "http://["],
        ["gateway", "--engine", ""],
        ["gateway", "--engine", "http://["],
    ],
)
def test_an_argument_that_means_nothing_is_a_typed_error(run, arguments):
    done = CliRunner().invoke(app, [run if word == "RUN" else word for word in arguments])
    assert done.exit_code == 2 or isinstance(done.exception, DeltaWireError), done.exception
