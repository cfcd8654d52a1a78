"""The figures of summary.json: which steps each is a mean or a median of, and when an audit counts as equal."""

from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from deltawire.demo.audit import compare
from deltawire.demo.commands import Commands
from deltawire.demo.games import SUMS, WORDLE, Game
from deltawire.demo.summary import Audit, DemoSummary, Served, Step, Traffic, summarize
from deltawire.upkeep.proofs import cache_folder

GAMES = (WORDLE, SUMS)
TRAFFIC = Traffic(received_bytes=500, deduplicated_bytes=20)
EQUAL = Audit(version=30, tensors=24, vllm_differs=[], bucket_differs=[], checksums=20, fresh_server_differs=[])


def step(number: int, *, act: str = "learn", changed: float = 0.5, delta_bytes: int = 100) -> Step:
    """Step `number` of a demo whose reward and win rate are the step's number and a hundredth of it."""
    return Step(
        act=act,
        learning_rate=1e-3 if act == "learn" else 2e-6,
        step=number,
        reward=float(number),
        win_rate=number / 100,
        staleness=number % 2,
        version=number,
        changed_fraction=changed,
        delta_bytes=delta_bytes,
        model_bytes=1000,
    )


def served(version: int, *, pause_ms: float = 1.0, publish_to_served_s: float = 0.5) -> Served:
    return Served(
        version=version,
        changed=1,
        wire_bytes=10,
        pause_ms=pause_ms,
        publish_to_served_s=publish_to_served_s,
        verified=True,
    )


def two_acts() -> list[Step]:
    learn = [step(number) for number in range(1, 31)]
    rl = [
        step(number, act="rl", changed=changed, delta_bytes=size)
        for number, changed, size in [(31, 0.9, 70), (32, 0.01, 10), (33, 0.02, 20), (34, 0.03, 30)]
    ]
    return learn + rl


def figures(audit: Audit = EQUAL) -> DemoSummary:
    updates = [served(1, pause_ms=9.0, publish_to_served_s=3.0), served(20, pause_ms=1.0), served(34, pause_ms=2.0)]
    return summarize(two_acts(), updates, audit, TRAFFIC, seconds=200.0)


def test_first_and_last_are_means_over_ten_steps_of_the_act_that_learns() -> None:
    summary = figures()
    assert (summary.reward_first, summary.reward_last) == (5.5, 25.5)
    assert (summary.win_rate_first, summary.win_rate_last) == pytest.approx((0.055, 0.255))


def test_each_act_has_its_own_means_and_the_medians_of_its_versions() -> None:
    learn, rl = figures().acts
    assert (learn.name, learn.learning_rate, learn.versions) == ("learn", 1e-3, 30)
    assert (rl.name, rl.learning_rate, rl.versions) == ("rl", 2e-6, 4)
    assert (rl.changed_fraction, rl.delta_bytes) == (0.025, 25)
    assert (rl.reward_first, rl.reward_last) == (32.5, 32.5)


def test_timings_are_medians_over_the_updates_vllm_took() -> None:
    summary = figures()
    assert (summary.updates, summary.pause_ms, summary.publish_to_served_s) == (3, 2.0, 0.5)


def test_the_summary_carries_the_sizes_and_the_servers_counters() -> None:
    summary = figures()
    assert (summary.versions, summary.model_bytes, summary.staleness) == (34, 1000, 0.5)
    assert summary.delta_bytes == 30 * 100 + 70 + 10 + 20 + 30
    assert (summary.server_received_bytes, summary.server_deduplicated_bytes) == (500, 20)


@pytest.mark.parametrize(
    ("audit", "equal"),
    [
        (EQUAL, True),
        (msgspec.structs.replace(EQUAL, vllm_differs=["model.norm.weight"]), False),
        (msgspec.structs.replace(EQUAL, bucket_differs=["model.norm.weight"]), False),
        (msgspec.structs.replace(EQUAL, fresh_server_differs=["model.norm.weight"]), False),
        (msgspec.structs.replace(EQUAL, tensors=0), False),
        (msgspec.structs.replace(EQUAL, checksums=0), False),
    ],
)
def test_an_audit_is_equal_only_if_there_was_something_to_compare_and_all_agree(audit: Audit, equal: bool) -> None:
    assert figures(audit).audit_equal is equal


def test_a_comparison_lists_tensors_that_differ_and_tensors_that_one_side_lacks() -> None:
    assert compare({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 9, "d": 3}) == ["b", "c", "d"]
    assert compare({"a": 1}, {"a": 1}) == []


def test_the_summary_names_what_the_file_must_hold() -> None:
    record = msgspec.to_builtins(figures())
    assert record.keys() >= {
        "reward_first", "reward_last", "win_rate_first", "win_rate_last", "versions", "model_bytes", "acts", "pause_ms",
        "publish_to_served_s", "audit_equal", "trainer_connected_to_vllm_for_weights",
    }  # fmt: skip
    assert record["acts"][0].keys() >= {"name", "learning_rate", "versions", "changed_fraction", "delta_bytes"}


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.name)
def test_the_modules_of_a_game_are_there_and_a_quick_one_has_a_few_steps(game: Game) -> None:
    for module in ("model", "environment", "trainer", *["exam"] * game.exam):
        assert find_spec(f"examples.{game.name}.{module}")
    assert sum(act.steps for act in game.quickly().acts) < 10 < sum(act.steps for act in game.acts)


def test_a_pretrained_model_is_made_once_for_all_checkouts_and_a_toy_once_for_each() -> None:
    wordle, sums = (Commands(Path("/checkout"), Path("run"), game).model_folder for game in GAMES)
    assert wordle == Path("/checkout/runs/model")
    assert sums == cache_folder() / "smollm2-135m-instruct"


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.name)
def test_the_trainer_is_told_nothing_by_which_it_could_send_weights_to_vllm(game: Game) -> None:
    commands = Commands(Path("checkout"), Path("run"), game)
    command = commands.trainer("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3")
    options = dict(zip(command.arguments[3::2], command.arguments[4::2], strict=True))
    assert figures().trainer_connected_to_vllm_for_weights is False
    assert options.keys() == {
        "--model", "--bucket", "--engine", "--served-model-name", "--environment", "--metrics", "--digests", "--act",
    }  # fmt: skip
    assert not any("VLLM" in name for name in command.environment)


def test_without_steps_or_updates_there_is_no_summary() -> None:
    with pytest.raises(ValueError, match="0 steps and 1 updates"):
        summarize([], [served(1)], EQUAL, TRAFFIC, seconds=1.0)
    with pytest.raises(ValueError, match="1 steps and 0 updates"):
        summarize([step(1)], [], EQUAL, TRAFFIC, seconds=1.0)
