"""What a running demo shows: plain lines anywhere, one panel on a terminal."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from deltawire.demo.games import WORDLE, Act
from deltawire.demo.progress import Progress
from deltawire.demo.screen import LiveScreen, PlainScreen, open_screen, panel, size, sparkline, step_line
from deltawire.errors import FormatError

ACTS = (Act("learn", 1e-3, 8), Act("rl", 2e-6, 4))


def step(number: int, act: Act = ACTS[0]) -> dict[str, object]:
    return {
        "event": "step", "act": act.name, "learning_rate": act.learning_rate, "step": number, "reward": 0.25,
        "win_rate": 0.5, "staleness": 2, "version": number, "changed_fraction": 0.0125, "delta_bytes": 2048,
        "model_bytes": 1 << 20,
    }  # fmt: skip


def update(version: int, *, verified: bool = True) -> dict[str, object]:
    return {
        "event": "update", "version": version, "changed": 7, "wire_bytes": 2048, "pause_ms": 1.5,
        "publish_to_served_s": 0.25, "verified": verified,
    }  # fmt: skip


@pytest.fixture
def progress() -> Progress:
    return Progress(replace(WORDLE, acts=ACTS))


@pytest.fixture
def output() -> StringIO:
    return StringIO()


def text_of(progress: Progress, waiting: str = "", seconds: float = 0.0) -> str:
    console = Console(file=StringIO(), width=120)
    with console.capture() as capture:
        console.print(panel(progress, waiting, seconds))
    return capture.get()


def test_without_a_terminal_lines_are_plain_and_on_a_terminal_only_if_asked_for(output: StringIO) -> None:
    assert isinstance(open_screen(Console(file=output), plain=False), PlainScreen)
    assert isinstance(open_screen(Console(file=output, force_terminal=True), plain=True), PlainScreen)
    assert isinstance(open_screen(Console(file=output, force_terminal=True), plain=False), LiveScreen)


def test_plain_lines_come_every_five_steps_and_at_the_last(progress: Progress, output: StringIO) -> None:
    with PlainScreen(Console(file=output)) as screen:
        for number in range(1, 13):
            progress.hear("trainer", step(number, ACTS[number > 8]))
            screen.draw(progress, "", 1.0 * number)
            screen.draw(progress, "", 1.0 * number)
    lines = output.getvalue().splitlines()
    assert [line.split(" s] ")[0].split()[-1] for line in lines] == ["5", "10", "12"]
    assert "act 1 of 2, learn at 0.001, step 5/8" in lines[0]
    assert "act 2 of 2, rl at 2e-06, step 2/4" in lines[1]


def test_a_step_that_took_long_is_told_by_itself(progress: Progress, output: StringIO) -> None:
    screen = PlainScreen(Console(file=output))
    for second in range(1, 30):
        if second % 12 == 0:
            progress.hear("trainer", step(second // 12))
        screen.draw(progress, "", float(second))
    assert [line.split(",")[2].split(":")[0] for line in output.getvalue().splitlines()] == [" step 1/8", " step 2/8"]


def test_a_plain_line_every_ten_seconds_says_what_is_waited_for(progress: Progress, output: StringIO) -> None:
    screen = PlainScreen(Console(file=output))
    for second in range(25):
        screen.draw(progress, f"vllm is starting, {second} s", float(second))
    assert output.getvalue().splitlines() == [
        "[  10 s] vllm is starting, 10 s",
        "[  20 s] vllm is starting, 20 s",
    ]


def test_the_plain_line_has_every_figure(progress: Progress) -> None:
    progress.hear("trainer", step(1))
    progress.hear("trainer", step(2))
    progress.hear("follower", update(1))
    progress.hear("trainer", {"event": "upload", "version": 2, "seconds": 0.125})
    assert step_line(progress) == (
        "act 1 of 2, learn at 0.001, step 2/8: reward 0.250, win rate 50%, version 2 published, 1 served, "
        "changed 1.25%, delta 2.0 KiB of 1.00 MiB, upload 0.12 s, staleness 2, pause 1.5 ms, verified"
    )


def test_an_only_act_has_no_number() -> None:
    alone = Progress(replace(WORDLE, acts=ACTS[:1]))
    alone.hear("trainer", step(3))
    assert step_line(alone).startswith("learn at 0.001, step 3/8: ")


def test_the_panel_has_every_figure(progress: Progress) -> None:
    progress.hear("trainer", step(1))
    progress.hear("follower", update(1))
    progress.hear("trainer", {"event": "upload", "version": 2, "seconds": 0.125})
    text = text_of(progress, "vllm is starting, 3 s", 75.0)
    for figure in (
        "1:15", "act 1 of 2, learn at 0.001, step 1/8", "● bucket-server", "● trainer", "0.250", "50%",
        "1 published, 1 served, staleness 2", "2.0 KiB of 1.00 MiB, uploaded in 0.12 s", "1.25% of the weights  ▁",
        "pause 1.5 ms, 0.25 s after publish, verified", "vllm is starting, 3 s",
    ):  # fmt: skip
        assert figure in text


def test_the_panel_names_the_page_once_it_is_there(progress: Progress) -> None:
    assert "http" not in text_of(progress)
    progress.hear("page", {"event": "page", "url": "http://127.0.0.1:8101"})
    assert "http://127.0.0.1:8101" in text_of(progress)


def test_before_the_first_step_the_panel_shows_the_processes_alone(progress: Progress) -> None:
    text = text_of(progress)
    assert "● follower" in text
    assert "reward" not in text


def test_an_update_that_was_not_verified_is_said_loudly(progress: Progress) -> None:
    progress.hear("trainer", step(1))
    progress.hear("follower", update(1, verified=False))
    assert "NOT VERIFIED" in step_line(progress)
    assert "NOT VERIFIED" in text_of(progress)


def test_the_followers_problem_stands_until_its_next_update(progress: Progress) -> None:
    progress.hear("follower", {"event": "problem", "error": "Unavailable: no answer"})
    assert "Unavailable: no answer" in text_of(progress)
    progress.hear("follower", update(1))
    assert "Unavailable" not in text_of(progress)
    progress.hear("follower", {"event": "problem", "error": "Unavailable: no answer"})
    progress.hear("follower", {"event": "current", "version": 1})
    assert "Unavailable" not in text_of(progress)


def test_a_record_that_lacks_a_field_is_an_error_that_names_process_and_field(progress: Progress) -> None:
    record = step(1)
    del record["reward"]
    with pytest.raises(FormatError, match=r"trainer .* `reward`"):
        progress.hear("trainer", record)


def test_the_live_screen_draws_on_a_terminal_and_keeps_events(progress: Progress, output: StringIO) -> None:
    with LiveScreen(Console(file=output, force_terminal=True, width=100)) as screen:
        screen.tell("vllm is ready", 3.0)
        screen.draw(progress, "", 4.0)
    assert "vllm is ready" in output.getvalue()
    assert "deltawire demo" in output.getvalue()


def test_a_sparkline_spans_lowest_to_highest_and_averages_neighbours() -> None:
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([0.0, 0.0, 1.0, 1.0], width=2) == "▁█"
    assert len(sparkline([float(i) for i in range(100)], width=32)) == 32


def test_sizes_are_in_kib_mib_and_gib() -> None:
    assert size(1536) == "1.5 KiB"
    assert size(3 << 19) == "1.50 MiB"
    assert size(5 << 29) == "2.50 GiB"
