"""The environment over real WebSockets: many sessions at once, and answers, never errors, to what cannot be played."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from openenv.core.generic_client import GenericEnvClient

ROOT = Path(__file__).parents[2]
SECRETS = ["cat", "dog", "sun", "map"]


async def play(url: str, guesses: list[str], **reset: Any) -> list[Any]:
    """The observations of one session, the first that of the reset."""
    async with GenericEnvClient(url) as session:
        first = await session.reset(**reset)
        return [first, *[await session.step({"guess": guess}) for guess in guesses]]


def test_a_game_is_marked_rewarded_and_won(environment_url: str) -> None:
    start, miss, win = asyncio.run(play(environment_url, ["can", "cat"], word="cat"))
    assert (start.observation["length"], start.observation["guesses_left"], start.done) == (3, 4, False)
    assert (miss.observation["feedback"], miss.done, miss.observation["won"]) == ("???", False, False)
    assert (win.observation["feedback"], win.done, win.observation["won"]) == ("GGG", True, True)
    assert miss.reward + win.reward == pytest.approx(-0.05 + 0.9)


def test_a_game_ends_with_the_last_guess(environment_url: str) -> None:
    answers = asyncio.run(play(environment_url, ["dog", "sun", "map", "pen"], word="cat"))
    assert [answer.done for answer in answers] == [False, False, False, False, True]
    assert [answer.observation["guesses_left"] for answer in answers] == [4, 3, 2, 1, 0]


def test_sixty_four_sessions_at_once_play_games_of_their_own(environment_url: str) -> None:
    async def all_at_once() -> list[list[Any]]:
        return await asyncio.gather(*(play(environment_url, ["cat", "dog"], seed=seed) for seed in range(64)))

    for seed, (_, cat, *dog) in enumerate(asyncio.run(all_at_once())):
        assert cat.observation["won"] == (SECRETS[seed % 4] == "cat")
        assert dog[0].observation["won"] == (SECRETS[seed % 4] in ("cat", "dog"))


@pytest.mark.parametrize(
    ("guess", "problem"), [("", "length"), ("c" * 100_000, "length"), ("\0\n ", "letters"), ("qqq", "unknown word")]
)
def test_a_guess_that_is_no_word_is_answered_with_a_problem(environment_url: str, guess: str, problem: str) -> None:
    _, answer = asyncio.run(play(environment_url, [guess], seed=0))
    assert (answer.observation["problem"], answer.observation["feedback"], answer.done) == (problem, "???", False)


def test_a_secret_that_is_no_word_starts_no_game(environment_url: str) -> None:
    start, answer = asyncio.run(play(environment_url, ["cat"], word="catty"))
    assert (start.observation["problem"], start.done) == ("length", True)
    assert (answer.observation["problem"], answer.done) == ("no game", True)


def test_a_session_outlives_an_action_of_the_wrong_form(environment_url: str) -> None:
    async def session() -> Any:
        async with GenericEnvClient(environment_url) as client:
            await client.reset(word="cat")
            with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
                await client.step({"word": "cat"})
            return await client.step({"guess": "cat"})

    assert asyncio.run(session()).observation["won"]


def test_the_secret_is_told_only_when_the_game_is_over(environment_url: str) -> None:
    async def session() -> tuple[Any, Any]:
        async with GenericEnvClient(environment_url) as client:
            await client.reset(word="cat")
            await client.step({"guess": "dog"})
            during = await client.state()
            await client.step({"guess": "cat"})
            return during, await client.state()

    during, after = asyncio.run(session())
    assert (during["guesses"], during["secret"], during["step_count"]) == (["dog"], None, 1)
    assert (after["guesses"], after["secret"]) == (["dog", "cat"], "cat")


def test_a_step_by_plain_http_which_has_no_session_is_answered_not_failed(environment_url: str) -> None:
    body = json.dumps({"action": {"guess": "cat"}}).encode()
    with urlopen(Request(f"{environment_url}/step", body, {"content-type": "application/json"})) as response:
        answer = json.load(response)
    assert (answer["observation"]["problem"], answer["done"]) == ("no game", True)


def test_rules_that_cannot_be_served_and_a_port_in_use_end_the_server_with_a_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, reason in [
            (["--length", "7"], "words.txt has"),
            (["--port", str(taken.getsockname()[1])], "in use"),
        ]:
            command = [sys.executable, "-m", "examples.wordle.environment", "--port", "0", *options]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
            assert ended.returncode == 2
            assert reason in ended.stderr
            assert "Traceback" not in ended.stderr
