"""The command line: every verb has help, the reference is current, and an error is one typed line and exit code 1."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from verbs import run_verb, say

import deltawire as dw
from deltawire.errors import FormatError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(tmp_path):
    """A folder bucket with an anchor and two deltas; its URL."""
    url = (tmp_path / "bucket").as_uri()
    weights = {"w": np.arange(1000, dtype=np.float16), "b": np.zeros(3, np.float16)}
    with dw.Publisher(dw.open_bucket(url, create=True)) as publisher:
        for step in range(3):
            weights["w"][step * 7] += 1
            publisher.publish(weights, step=step)
            publisher.flush(20)
    return url


def test_the_cli_reference_is_what_the_commands_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cli_reference

    assert cli_reference.PAGE.read_text() == cli_reference.reference(), "run `make docs`"


def test_log_lists_every_version(published):
    commits = [json.loads(line) for line in run_verb("log", published, "--json").stdout.splitlines()]
    assert [(commit["version"], commit.get("parent")) for commit in commits] == [(0, None), (1, 0), (2, 1)]
    assert "anchor" in run_verb("log", published).stdout


def test_verify_reads_the_whole_run(published):
    assert "2 deltas, 0 folds, 1 anchor or base," in run_verb("verify", published).stdout
    report = json.loads(run_verb("verify", published, "--json").stdout)
    assert (report["first"], report["position"]["version"], report["deltas"]) == (0, 2, 2)


def test_verify_refuses_a_damaged_run(published, tmp_path):
    (victim,) = (tmp_path / "bucket").glob("runs/*/deltas/step_000001-*")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert "BadDigest" in run_verb("verify", published, code=1).stderr


def test_materialize_writes_the_version_asked_for(published, tmp_path):
    report = json.loads(run_verb("materialize", published, tmp_path / "out", "--version", 1, "--json").stdout)
    assert report["position"]["version"] == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "no config.json" in run_verb("materialize", published, tmp_path / "plain").stdout


def test_compact_folds_once_and_prune_deletes_only_when_told(published, tmp_path):
    with dw.Publisher(dw.open_bucket(published)) as publisher:
        weights = {"w": np.arange(1000, dtype=np.float16) + 3, "b": np.zeros(3, np.float16)}
        for step in range(6):
            weights["w"][step] += 1
            publisher.publish(weights, step=step)
            publisher.flush(20)
    command = ("compact", published, "--mirror", tmp_path / "mirror", "--anchor-every", "5", "--json")
    written = [json.loads(line) for line in run_verb(*command).stdout.splitlines()]
    assert [(report["parent"], report["version"]) for report in written] == [(0, 4), (4, 8), (None, 8)]
    assert run_verb(*command).stdout == ""
    folder = tmp_path / "bucket"
    before = sorted(folder.rglob("*"))
    plan = json.loads(run_verb("prune", published, "--keep-anchors", "1", "--keep-hours", "0", "--json").stdout)
    assert (plan["deleted"], plan["floor"]) == (False, 8)
    assert sorted(folder.rglob("*")) == before
    run_verb("prune", published, "--keep-anchors", "1", "--keep-hours", "0", "--delete")
    assert not [key for key in plan["keys"] if (folder / key).exists()]
    assert "versions 8 to 8" in run_verb("verify", published).stdout


def test_a_key_that_keygen_made_signs_a_run_that_is_read_with_its_public_half_alone(tmp_path):
    made = [json.loads(run_verb("keygen", tmp_path / name, "--json").stdout) for name in ("mine", "other")]
    assert "exists" in run_verb("keygen", tmp_path / "mine", code=1).stderr
    url = (tmp_path / "bucket").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True), signing_key=tmp_path / "mine") as publisher:
        publisher.publish({"w": np.ones(3, np.float16)})
    run_verb("log", url, "--trust", made[0]["public"])
    assert "BadSignature" in run_verb("log", url, "--trust", made[1]["public"], code=1).stderr


def test_inspect_shows_a_delta_file(published, tmp_path):
    (file,) = (tmp_path / "bucket").glob("runs/*/deltas/step_000002-*")
    shown = json.loads(run_verb("inspect", file, "--json").stdout)
    assert [tensor["name"] for tensor in shown["tensors"]] == ["w"]
    assert "seal right" in run_verb("inspect", file).stdout
    for bucket in (published, tmp_path / "bucket"):
        assert "`deltawire log`" in run_verb("inspect", bucket, code=2).stderr


def test_an_empty_bucket_is_one_typed_line(tmp_path):
    done = run_verb("log", (tmp_path / "nothing").as_uri(), code=1)
    assert done.stderr.startswith("deltawire: NotFound:")
    assert "Traceback" not in done.stderr


def test_a_folder_without_a_dot_is_named_as_it_must_be_written():
    assert "for a folder write ./runs/x" in run_verb("log", "runs/x", code=1).stderr


def test_a_url_that_is_none_names_the_known_kinds():
    assert "hf://buckets/" in run_verb("log", "ftp://x", code=1).stderr


def test_following_without_a_server_says_so(published):
    done = run_verb("follow", "--bucket", published, "--engine", "http://127.0.0.1:9", "--once", code=1)
    assert "EngineUnavailable" in done.stderr


def test_log_lists_as_many_of_the_newest_as_asked_for(published):
    said = run_verb("log", published, "-n", 1).stdout
    assert "2 older" in said and "anchor" not in said
    two = [json.loads(line) for line in run_verb("log", published, "-n", 2, "--json").stdout.splitlines()]
    assert [commit["version"] for commit in two] == [1, 2]
    assert "older" not in run_verb("log", published, "-n", 0).stdout


def test_what_needs_the_repository_is_offered_only_there(tmp_path):
    """The package alone, as a wheel installs it: `demo` and `spaces` are not listed, and say what they need."""
    shutil.copytree(ROOT / "src" / "deltawire", tmp_path / "deltawire", ignore=shutil.ignore_patterns("__pycache__"))
    alone = [sys.executable, "-c", "from deltawire.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def say(*arguments):
        command = [*alone, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert " demo " in run_verb("--help").stdout and " spaces " in run_verb("--help").stdout
    listed = say("--help").stdout
    assert " follow " in listed and " demo " not in listed and " spaces " not in listed
    for arguments in (["spaces", "render", "--user", "me"], ["demo"]):
        assert "run it in a checkout" in say(*arguments).stderr


def test_a_table_cuts_no_name(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "model.layers.0.self_attn." + 5 * "a_very_long_name." + "weight"
    delta = dw.Delta.between({name: np.zeros(3, np.float16)}, {name: np.ones(3, np.float16)})
    (tmp_path / "delta.safetensors").write_bytes(dw.encode(delta))
    shown = run_verb("inspect", tmp_path / "delta.safetensors").stdout
    below = shown[shown.rindex("─") + 1 :].splitlines()
    assert "".join(line.split("  ")[0].strip() for line in below) == name


def test_a_narrow_table_breaks_no_short_word(published, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    words = run_verb("log", published).stdout.split()
    assert {"version", "anchor", "tensors", "writer", "bytes"} <= set(words)


def test_a_table_in_a_pipe_has_a_line_a_version(published, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    _, _, rule, *rows = run_verb("log", published).stdout.splitlines()
    assert set(rule) == {"─"} and [row.split()[0] for row in rows[:3]] == ["0", "1", "2"]


def test_each_verb_is_listed_with_a_whole_sentence(monkeypatch):
    """Click cuts what is longer than its line, and ends it with three points."""
    monkeypatch.setenv("COLUMNS", "80")
    listed = run_verb("--help").stdout.split("Commands:")[1].strip().splitlines()
    assert len(listed) > 20 and all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_what_has_nothing_to_do_says_so(published, tmp_path):
    run_verb("compact", published, "--mirror", tmp_path / "mirror")
    assert "nothing to write" in run_verb("compact", published, "--mirror", tmp_path / "mirror").stdout
    assert "nothing to delete" in run_verb("prune", published).stdout
    relay = (tmp_path / "relay").as_uri()
    assert "2 is at" in run_verb("relay", published, relay, "--once").stdout
    assert "nothing to copy" in run_verb("relay", published, relay, "--once").stdout
    assert not run_verb("relay", published, relay, "--once", "--json").stdout


def test_without_a_terminal_no_bar_leaves_an_empty_line(published, tmp_path):
    assert not run_verb("verify", published).stderr
    assert not run_verb("materialize", published, tmp_path / "out").stderr


def test_a_metric_that_no_version_has_is_refused_with_those_there(published):
    assert "no version listed has loss; metrics: none" in run_verb("log", published, "--metric", "loss", code=2).stderr


def test_a_flag_has_an_opposite_only_where_a_variable_sets_it():
    """A command line has the last word over the environment; elsewhere the opposite is what happens anyway."""
    import typer

    from deltawire.cli import app

    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            if getattr(option, "secondary_opts", None):
                assert option.envvar, f"{name} {option.opts}"


@pytest.mark.parametrize(
    ("words", "offered"), [("ma", "materialize"), ("log --on", "--oneline"), ("follow --pause k", "keep")]
)
def test_the_shell_completes_verbs_options_and_choices(words, offered):
    """What bash asks the command that `deltawire --install-completion` sets up."""
    typed = f"deltawire {words}"
    asked = {"_DELTAWIRE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    code = "import sys; sys.argv = ['deltawire']; from deltawire.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [offered]


def test_a_version_that_is_there_already_is_not_called_applied(published, tmp_path):
    out = tmp_path / "out"
    assert re.search(r"2 deltas applied, [\d.]+ KiB fetched", say("materialize", published, out))
    assert "it was there already" in say("materialize", published, out)
    assert "1 delta applied" in say("materialize", published, out, "--version", 1)


def test_a_file_that_is_no_delta_is_named(tmp_path):
    (tmp_path / "odd").write_bytes(bytes(64))
    with pytest.raises(FormatError, match=f"{tmp_path}/odd: "):
        say("inspect", tmp_path / "odd")


def test_no_version_this_young_is_said(published):
    assert say("log", published, "--since", "0s") == "no version is this young; 3 are older\n"


def test_the_help_says_what_exit_codes_mean():
    told = " ".join(say("--help").split())
    assert "2 a command line that is wrong" in told and "or from DELTAWIRE_BUCKET" in told
    assert "130 ended by Ctrl-C" in told
