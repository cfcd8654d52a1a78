"""The processes of a command: logged, watched, ended in order, and never left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import PARENT, POLITE, STUBBORN, TELL, WAIT, is_running, python, wait_for_end
from waiting import until

from deltawire.demo import processes
from deltawire.demo.processes import Child, Children, Command, ProcessFailed, Tail


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Children(tmp_path / "logs") as started:
        yield started


def start(children: Children, source: str, *, name: str = "child", grace: float = 5.0) -> Child:
    return children.start(Command(name, python(source), grace=grace))


def ready(child: Child) -> dict[str, int]:
    return until(lambda: next(child.output.records(), None))


def test_a_process_that_is_closed_is_asked_with_sigterm_and_is_gone(children: Children) -> None:
    child = start(children, POLITE)
    pid = ready(child)["pid"]
    assert child.close() == 0
    assert not is_running(pid)


def test_a_process_ended_by_a_signal_has_128_plus_its_number_as_exit_code(children: Children) -> None:
    child = start(children, WAIT)
    ready(child)
    assert child.close() == 128 + signal.SIGTERM


def test_a_process_that_ignores_sigterm_is_killed_when_its_grace_is_over(children: Children) -> None:
    child = start(children, STUBBORN, grace=0.1)
    pid = ready(child)["pid"]
    assert child.close() == 128 + signal.SIGKILL
    assert not is_running(pid)


def test_after_a_failure_a_process_that_ignores_sigterm_gets_little_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "HURRY", 0.1)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="something failed"), Children(tmp_path) as children:
        child = start(children, STUBBORN, grace=600.0)
        pid = ready(child)["pid"]
        raise RuntimeError("something failed")
    assert child.code == 128 + signal.SIGKILL
    assert not is_running(pid)
    assert time.monotonic() - began < 60


def test_what_a_process_started_is_gone_with_it(children: Children) -> None:
    child = start(children, PARENT)
    record = ready(child)
    child.close()
    wait_for_end(record["grandchild"])
    assert not is_running(record["pid"])


def test_what_a_process_left_behind_when_it_ended_by_itself_is_killed(children: Children) -> None:
    child = start(children, PARENT.replace("signal.pause()\n", "sys.exit(0)\n"))
    record = ready(child)
    wait_for_end(record["grandchild"])
    assert child.close() == 0


def test_no_process_survives_an_owner_that_was_killed(tmp_path: Path) -> None:
    owner = tmp_path / "owner.py"
    owner.write_text(
        f"""
import signal
from pathlib import Path
from deltawire.demo import processes
from deltawire.demo.processes import Children, Command
children = Children(Path({str(tmp_path / "logs")!r}))
for name, source in [("plain", {WAIT!r}), ("parent", {PARENT!r}), ("stubborn", {STUBBORN!r})]:
    children.start(Command(name, [{sys.executable!r}, "-S", "-c", source], grace=0.2))
signal.pause()
"""
    )
    process = subprocess.Popen([sys.executable, owner])
    logs = {name: Tail(tmp_path / "logs" / f"{name}.log") for name in ("plain", "parent", "stubborn")}
    try:
        records = {name: until(lambda tail=tail: next(tail.records(), None)) for name, tail in logs.items()}
    finally:
        process.kill()
        process.wait()
    for pid in (*(record["pid"] for record in records.values()), records["parent"]["grandchild"]):
        wait_for_end(pid)


def test_a_failed_process_is_named_and_its_error_shows_the_end_of_its_log(children: Children) -> None:
    lines = "\n".join(f"print('line {i}')" for i in range(30))
    broken = start(children, f"{lines}\nraise SystemExit('no such model')", name="vllm")
    assert until(lambda: broken.code) == 1
    error = broken.failed("is broken")
    assert isinstance(error, ProcessFailed)
    message = str(error)
    assert re.match(r"vllm is broken; .*vllm\.log ends:\n", message)
    assert "no such model" in message
    assert "line 29" in message
    assert "line 9\n" not in message


def test_a_command_that_is_not_there_ends_with_127_and_a_log_that_names_it(children: Children) -> None:
    child = children.start(Command("follower", ["/no/such/program"]))
    assert until(lambda: child.code) == 127
    assert "\n  /no/such/program: No such file" in str(child.failed("is broken"))


def test_closing_ends_all_even_if_one_had_failed(tmp_path: Path) -> None:
    children = Children(tmp_path)
    pid = ready(start(children, WAIT, name="first"))["pid"]
    failed = start(children, "raise SystemExit(3)", name="second")
    until(lambda: failed.code)
    assert children.close() == {"first": 143, "second": 3}
    assert not is_running(pid)


def test_a_process_gets_its_own_environment_and_folder_and_a_session_of_its_own(
    children: Children, tmp_path: Path
) -> None:
    source = TELL + "tell(value=os.environ['VALUE'], folder=os.getcwd(), session=os.getsid(0))"
    child = children.start(Command("child", python(source), {"VALUE": "7"}, tmp_path))
    record = ready(child)
    assert (record["value"], record["folder"]) == ("7", str(tmp_path))
    assert record["session"] != os.getsid(0)


def test_a_tail_yields_each_whole_json_line_once_and_skips_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert list(tail.records()) == []
    path.write_bytes(b'INFO starting\n{"version": 1}\n[1]\n{"broken\n{"version"')
    assert list(tail.records()) == [{"version": 1}]
    with path.open("ab") as file:
        file.write(b": 2}\n\xff\n")
    assert list(tail.records()) == [{"version": 2}]
    assert list(tail.records()) == []
