"""Rollouts, with the real environment and a scripted stand-in for vLLM: what is recorded of each game, and what is said
when a server is not as it should be."""

import asyncio
import traceback
from collections.abc import Sequence

import pytest
from completions import TOKENIZER, Completions
from examples.wordle.lines import Lines
from examples.wordle.rollouts import Episode, Player, Rollout, ServerError

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


def play(vllm: Completions, environment_url: str, groups: int = 2, members: int = 3) -> Rollout:
    async def once() -> Rollout:
        async with (
            vllm.serve() as url,
            Player(url, environment_url, Lines(TOKENIZER), groups=groups, members=members) as player,
        ):
            return await player.play(0)

    return asyncio.run(once())


def cat_then_dog(prompt: Sequence[int]) -> str:
    return "cat\n" if len(prompt) == 1 else "dog\n"


def text(episode: Episode) -> str:
    return TOKENIZER.decode(episode.tokens)


def test_each_group_plays_one_secret_to_the_end_and_keeps_what_the_environment_paid(environment_url: str) -> None:
    cats, dogs = play(Completions(cat_then_dog), environment_url).groups
    assert [(text(game), game.won, game.turns) for game in cats] == [("<bos>cat\nGGG\n", True, 1)] * 3
    assert [(text(game), game.won, game.turns) for game in dogs] == [("<bos>cat\nXXX\ndog\nGGG\n", True, 2)] * 3
    assert [game.reward for game in cats + dogs] == pytest.approx([1.0] * 3 + [0.9] * 3)


def test_the_mask_is_on_the_tokens_the_policy_chose_with_their_logprobs_in_place(environment_url: str) -> None:
    _, (game, *_) = play(Completions(cat_then_dog), environment_url).groups
    assert [text for text, own in zip(text(game).removeprefix("<bos>"), game.sampled[1:], strict=True) if own] == list(
        "cat\ndog\n"
    )
    assert game.logprobs == [0, 0, -1, -2, -3, 0, 0, 0, 0, 0, -1, -2, -3, 0, 0, 0, 0]


def test_a_line_the_policy_did_not_end_is_ended_for_it_and_answered(environment_url: str) -> None:
    ((game, *_), _) = play(Completions(lambda prompt: "babble"), environment_url).groups
    assert text(game) == "<bos>" + "babb\n???\n" * 4
    assert sum(game.sampled) == 4 * 4
    assert (game.won, game.turns, game.reward) == (False, 4, pytest.approx(-0.2))


def test_a_rollout_tells_the_versions_before_and_after_it(environment_url: str) -> None:
    vllm = Completions(cat_then_dog, versions=["default", "run:4", "run:6"])
    rollout = play(vllm, environment_url)
    assert (rollout.version_before, rollout.version_after) == ("run:4", "run:6")
    assert rollout.seconds > 0


def test_where_vllm_tells_which_weights_made_which_token_the_rollout_says_so(environment_url: str) -> None:
    vllm = Completions(cat_then_dog, versions=["run:4", "run:4", "run:12"])
    vllm.made_by = ["run:9", "run:10"]
    rollout = play(vllm, environment_url)
    assert (rollout.version_before, rollout.version_after) == ("run:9", "run:10")
    vllm.versions, vllm.made_by = ["run:4", "run:4", "run:12"], ["default", "run:5"]
    rollout = play(vllm, environment_url)
    assert (rollout.version_before, rollout.version_after) == ("run:4", "run:12")


def test_where_only_headers_tell_which_weights_answered_the_rollout_says_so(environment_url: str) -> None:
    vllm = Completions(cat_then_dog, versions=["run:4", "run:4", "run:12"])
    vllm.headers = {"X-Policy-Version": "run:9", "X-Policy-Version-Last": "run:10"}
    rollout = play(vllm, environment_url)
    assert (rollout.version_before, rollout.version_after) == ("run:9", "run:10")
    vllm.made_by = ["run:11"]
    rollout = play(vllm, environment_url)
    assert (rollout.version_before, rollout.version_after) == ("run:11", "run:11"), "what tells of tokens goes first"


def test_a_vllm_that_pauses_is_asked_again_and_nothing_is_sampled_twice(environment_url: str, monkeypatch) -> None:
    monkeypatch.setattr("examples.wordle.rollouts.ASK_AGAIN", 0.001)
    vllm = Completions(cat_then_dog)
    vllm.pauses = 3
    cats, dogs = play(vllm, environment_url).groups
    assert [(game.won, game.turns) for game in cats + dogs] == [(True, 1)] * 3 + [(True, 2)] * 3
    assert len(vllm.requests) == 2 + 3


def test_a_password_in_the_address_is_sent_and_in_no_error(environment_url: str) -> None:
    player = Player("http://someone:hunter2@127.0.0.1:9/", environment_url, Lines(TOKENIZER))
    assert (player.engine_url, player._login) == ("http://127.0.0.1:9", "Basic c29tZW9uZTpodW50ZXIy")

    async def enter() -> None:
        async with player:
            pass

    with pytest.raises(ServerError) as gone:
        asyncio.run(enter())
    assert "hunter2" not in "".join(traceback.format_exception(gone.value))


def test_a_turn_is_one_request_of_token_ids_for_the_untouched_distribution(environment_url: str) -> None:
    vllm = Completions(cat_then_dog)
    play(vllm, environment_url)
    first, second = vllm.requests
    assert (len(first["prompt"]), len(second["prompt"])) == (6, 3)
    assert first["prompt"][0] == [TOKENIZER.bos_token_id]
    assert first["return_token_ids"] is True
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (1.0, 1.0, 4)


def test_without_dev_mode_the_error_says_how_to_start_vllm(environment_url: str) -> None:
    vllm = Completions(cat_then_dog)
    vllm.dev_mode = False
    with pytest.raises(ServerError, match=r"/weight_info: not found; .*VLLM_SERVER_DEV_MODE=1"):
        play(vllm, environment_url)


def test_an_error_of_vllm_is_told_with_its_url_and_text(environment_url: str) -> None:
    vllm = Completions(cat_then_dog)
    vllm.fault = 500
    with pytest.raises(ServerError, match=r"/v1/completions: HTTP 500: .*the engine is dead"):
        play(vllm, environment_url)


def test_a_vllm_that_is_not_there_is_named_with_what_to_start(environment_url: str) -> None:
    async def enter() -> None:
        async with Player(NOWHERE, environment_url, Lines(TOKENIZER)):
            pass

    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/weight_info: .*vllm serve"):
        asyncio.run(enter())


def test_an_environment_that_is_not_there_is_named_with_what_to_start() -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9: .*python -m examples\.wordle\.environment"):
        play(Completions(cat_then_dog), NOWHERE)
