"""The demo with stand-ins: the whole progress, and what is said and left behind when a process fails, hangs or dies."""

import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from fakes import PROCESS_NAMES, FakeCommands, fake_commands
from rich.console import Console
from scripts import is_running, wait_for_end
from waiting import until

from deltawire.demo import commands as real_commands
from deltawire.demo.commands import NoExamples, find_checkout
from deltawire.demo.demo import DemoOptions, run_demo
from deltawire.demo.games import Patience
from deltawire.demo.processes import ProcessFailed
from deltawire.demo.summary import DemoSummary
from deltawire.errors import AlreadyExists

FAIL = "print('the reason'); sys.exit(3)\n"
PATIENT = Patience(start=20.0, news=20.0)
HANG = "while True: signal.pause()\n"


@pytest.fixture
def commands(tmp_path: Path) -> FakeCommands:
    return fake_commands(tmp_path / "run")


def play(commands: FakeCommands, *, patience: Patience = PATIENT) -> tuple[DemoSummary, str]:
    output = StringIO()
    summary = run_demo(DemoOptions(patience=patience), commands=commands, console=Console(file=output, width=200))
    return summary, output.getvalue()


def assert_nothing_is_left(commands: FakeCommands, *expected: str) -> None:
    pids = commands.pids()
    assert pids.keys() >= set(expected)
    assert not [name for name, pid in pids.items() if is_running(pid)]


def test_a_demo_ends_with_equal_weights_a_summary_and_no_process_left(commands: FakeCommands) -> None:
    summary, output = play(commands)
    assert summary.audit_equal
    assert summary.audit.tensors == 1
    assert [(act.name, act.versions) for act in summary.acts] == [("learn", 2), ("rl", 1)]
    assert (summary.server_received_bytes, summary.server_deduplicated_bytes) == (90, 4)
    assert msgspec.json.decode((commands.folder / "summary.json").read_bytes(), type=DemoSummary) == summary
    assert "act 2 of 2, rl at 2e-06, step 1/1" in output
    assert "version 3: equal" in output
    assert "a page shows the run and its server: http://127.0.0.1:2" in output
    assert "What is 1 + 2? It is 4.�[2J Or 5? [wrong]" in output
    assert "after training 1 of 1 answers to held-out questions are right" in output
    assert "right: 0 of 1 → 1 of 1" in output
    assert [exam.right for exam in summary.exams] == [0, 1]
    assert f"deltawire serve --root {commands.buckets}," in output
    assert_nothing_is_left(commands, *PROCESS_NAMES)


def test_weights_in_vllm_that_are_not_the_trainers_make_the_audit_unequal(commands: FakeCommands) -> None:
    summary, output = play(commands.with_digest("vllm", "00000000000000ff"))
    assert not summary.audit_equal
    assert summary.audit.vllm_differs == ["w"]
    assert summary.audit.bucket_differs == []
    assert "DIFFERENT" in output


def test_a_fresh_server_with_other_weights_makes_the_audit_unequal(commands: FakeCommands) -> None:
    summary, output = play(commands.with_digest("fresh-vllm", "00000000000000ff"))
    assert not summary.audit_equal
    assert summary.audit.fresh_server_differs == ["w"]
    assert summary.audit.vllm_differs == []
    assert "DIFFERENT" in output


@pytest.mark.parametrize("name", PROCESS_NAMES)
def test_a_process_that_fails_is_named_with_its_log_and_the_others_are_ended(commands: FakeCommands, name: str) -> None:
    broken = commands.breaking(name, FAIL)
    with pytest.raises(
        ProcessFailed, match=rf"{name} ended with exit code 3; .*{name}\.log ends:\n(.*\n)*  the reason"
    ):
        play(broken)
    assert_nothing_is_left(commands, name)


@pytest.mark.parametrize("name", ["bucket-server", "vllm", "trainer"])
def test_a_process_that_never_gets_ready_is_given_up_on(commands: FakeCommands, name: str) -> None:
    with pytest.raises(ProcessFailed, match=rf"{name} did not get ready in 4 s"):
        play(commands.breaking(name, HANG), patience=Patience(start=4.0))
    assert_nothing_is_left(commands, name)


def test_a_server_that_ends_by_itself_has_failed_even_with_exit_code_0(commands: FakeCommands) -> None:
    with pytest.raises(ProcessFailed, match="environment ended with exit code 0"):
        play(commands.breaking("environment", "").breaking("trainer", HANG))
    assert_nothing_is_left(commands, "environment")


def test_a_trainer_that_falls_silent_is_given_up_on(commands: FakeCommands) -> None:
    start = "open(os.environ['METRICS'], 'w').write(json.dumps(dict(event='start', version=0)) + chr(10))\n"
    with pytest.raises(ProcessFailed, match=r"trainer did not say anything new in 0\.5 s"):
        play(commands.breaking("trainer", start + HANG), patience=Patience(news=0.5))
    assert_nothing_is_left(commands, "trainer", "follower", "vllm")


def test_a_process_that_must_be_killed_at_the_end_makes_the_demo_fail_and_leaves_the_summary(
    commands: FakeCommands,
) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell(event='ready', url='')\n" + HANG
    with pytest.raises(ProcessFailed, match=r"environment did not end cleanly \(exit code 137\)"):
        play(commands.breaking("environment", stubborn).with_grace(0.2))
    assert (commands.folder / "summary.json").is_file()
    assert_nothing_is_left(commands, "environment")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_survives_a_demo_that_is_interrupted(
    commands: FakeCommands, tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "demo.py"
    script.write_text(
        f"""
import signal
from pathlib import Path
from fakes import fake_commands
from deltawire.demo.demo import DemoOptions, run_demo
from deltawire.demo.games import Patience
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
run_demo(DemoOptions(plain=True), commands=fake_commands(Path({str(commands.folder)!r})).breaking("trainer", {HANG!r}))
"""
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(real_commands.__file__).parents[2]}"}
    with (tmp_path / "output").open("w") as output:
        demo = subprocess.Popen([sys.executable, script], env=environment, stdout=output, stderr=output)
        try:
            until(lambda: commands.pids().get("trainer"), unless=lambda: demo.poll() is not None)
            demo.send_signal(number)
            demo.wait(90)
        finally:
            demo.kill()
            demo.wait()
    assert demo.returncode == -number
    for pid in commands.pids().values():
        wait_for_end(pid)
    assert commands.pids().keys() >= {"bucket-server", "environment", "vllm", "trainer"}
    assert ("ending all processes" in (tmp_path / "output").read_text()) == (number == signal.SIGINT)


def test_a_folder_in_use_is_refused_before_anything_starts(commands: FakeCommands) -> None:
    commands.folder.mkdir()
    (commands.folder / "summary.json").write_text("{}")
    with pytest.raises(AlreadyExists, match="is not empty; name another folder"):
        play(commands)
    assert not (commands.folder / "logs").exists()


def test_outside_a_checkout_the_demo_says_where_it_needs_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_commands.deltawire, "__file__", str(tmp_path / "site-packages/deltawire/__init__.py"))
    with pytest.raises(NoExamples, match="run it in a checkout"):
        find_checkout()
