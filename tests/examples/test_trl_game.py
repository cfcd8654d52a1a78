"""Wordle under TRL: the tool plays on a real OpenEnv server, and the toy's lines are tool calls, token for token."""

import pickle
from functools import partial

import pytest
from examples.trl.game import Wordle, teach_to_chat
from examples.wordle.game import Rules, secret_for
from examples.wordle.model import build_tokenizer
from transformers.utils import get_json_schema


def test_the_tool_plays_on_the_server_and_the_reward_is_the_games(environment_url):
    factory = pickle.loads(pickle.dumps(partial(Wordle, environment_url)))  # TRL plays in a process of its own
    game = factory()
    secret = secret_for(1, Rules())
    try:
        assert game.reset(seed=1, prompt="what else is in the row") is None
        assert (game.guess("zzz"), game.get_reward()) == ("???", -0.05)
        assert (game.guess(secret), game.get_reward()) == ("GGG", pytest.approx(0.9 - 0.05))
        assert (game.guess(secret), game.get_reward()) == ("", pytest.approx(0.9 - 0.05))  # over
        game.reset(seed=1)
        assert (game.get_reward(), game.guess(secret), game.get_reward()) == (0.0, "GGG", 1.0)
    finally:
        game._server.close()
    assert get_json_schema(game.guess)["function"]["parameters"]["required"] == ["word"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    teach_to_chat(tokenizer)
    return tokenizer


def tokens(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_game_told_as_messages_is_the_tokens_that_were_sampled_and_read(tokenizer):
    messages = [{"role": "user", "content": "find the word"}]
    seen = [tokenizer.bos_token_id]
    for guess, marks in [("cat", "GYX"), ("q?", "???"), ("", "???"), ("dog", "GGG")]:
        assert tokens(tokenizer, messages) == seen
        sampled = tokenizer.encode(guess + "\n")
        message = tokenizer.parse_response(sampled, prefix=seen)
        (call,) = message["tool_calls"]
        assert call["function"] == {"name": "guess", "arguments": {"word": guess}}
        message["content"] = message.get("content", "")  # as TRL hands it on
        messages += [message, {"role": "tool", "name": "guess", "content": marks}]
        seen += sampled + tokenizer.encode(marks + "\n")
    assert tokens(tokenizer, messages) == seen


def test_a_line_that_was_cut_off_calls_nothing(tokenizer):
    message = tokenizer.parse_response(tokenizer.encode("catdo"), prefix=[tokenizer.bos_token_id])
    assert message == {"role": "assistant", "content": "catdo"}
