"""Small sums: what is asked and what is held out, what an answer is worth, and a model from a config that learns them.

The parts are those of `make demo-real`, but for the weights, and vLLM, for which a script answers.
"""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import uvicorn
from aiohttp import ClientResponseError
from completions import Completions
from examples.sums.chat import Chat
from examples.sums.environment import SumsAction, SumsEnvironment, SumsObservation
from examples.sums.exam import ask
from examples.sums.game import HELD_OUT, LONGEST, Sum, held_out, sum_for, trained, worth
from examples.sums.trainer import SUMS
from examples.wordle.environment import server_app
from examples.wordle.learner import as_batch
from examples.wordle.rollouts import Player, Rollout
from examples.wordle.trainer import Act, Bounds, served_digests, train
from openenv.core.env_server.types import State
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from waiting import until

import deltawire as dw
from deltawire.format.checkpoint import Checkpoint

ASK, ANSWER, END = "<q>", "<a>", "<e>"
TEMPLATE = "{% for message in messages %}<q>{{ message['content'] }}{% endfor %}<a>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of a sum, and a chat template."""
    characters = [ASK, ANSWER, END, *"What is 0123456789+=?."]
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(dict.fromkeys(characters))}, unk_token="."))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([ASK, ANSWER, END])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, chat_template=TEMPLATE)


TOKENIZER = build_tokenizer()


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def numbers(prompt: Sequence[int]) -> list[int]:
    return [int(number) for number in re.findall(r"\d", TOKENIZER.decode(prompt))]


class Half:
    """Answers right every second time, then one too many."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompt: Sequence[int]) -> str:
        self.asked += 1
        a, b = numbers(prompt)
        return f"{a} + {b} = {a + b + self.asked % 2}.{END}"


@pytest.fixture(scope="module")
def sums_url() -> Iterator[str]:
    """The sums' own server, on a thread."""
    app = server_app("sums", SumsEnvironment, (SumsAction, SumsObservation, State), sessions=16)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def play(vllm: Completions, sums_url: str) -> Rollout:
    async def once() -> Rollout:
        async with vllm.serve() as url, Player(url, sums_url, Chat(TOKENIZER), groups=2, members=4) as player:
            return await player.play(0)

    return asyncio.run(once())


def test_no_seed_asks_what_is_held_out_in_either_order_and_seeds_go_round_all_others() -> None:
    never = {frozenset(pair) for pair in HELD_OUT}
    asked = [sum_for(seed) for seed in range(len(trained()))]
    assert not [one for one in asked if frozenset((one.a, one.b)) in never]
    assert len(set(asked)) == len(asked) == 64 - 11
    assert sum_for(len(asked)) == asked[0]
    assert [(one.a, one.b) for one in held_out()] == list(HELD_OUT)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("15", True), ("7 + 8 = 15.", True), ("The answer is 15", True), ("7 + 8 = 16", False), ("15 or 16", False),
        ("115", False), ("", False), ("fifteen", False),
    ],
)  # fmt: skip
def test_an_answer_is_right_if_its_last_number_is_the_sum(answer: str, right: bool) -> None:
    assert Sum(7, 8).is_right(answer) is right


def test_to_be_right_is_worth_more_than_to_end_in_time() -> None:
    assert worth(True, True) > worth(True, False) > worth(False, True) > worth(False, False) == 0


def test_a_rollout_asks_by_the_chat_template_and_pays_each_answer(sums_url: str) -> None:
    rollout = play(Completions(Half(), tokenizer=TOKENIZER), sums_url)
    for group, asked in zip(rollout.groups, trained(), strict=False):
        assert [episode.reward for episode in group] == [0.25, 1.25] * 2
        assert [episode.won for episode in group] == [False, True] * 2
        for episode in group:
            text = TOKENIZER.decode(episode.tokens)
            assert text.startswith(f"{ASK}{asked.question}{ANSWER}{asked.a} + {asked.b} = ") and text.endswith(END)
            own = [token for token, sampled in zip(episode.tokens, episode.sampled, strict=True) if sampled]
            assert own == episode.last_turn and TOKENIZER.decode(own) in text.split(ANSWER)[1]


def test_an_answer_that_is_cut_off_is_paid_for_what_it_says_and_not_for_ending(sums_url: str) -> None:
    long = Completions(lambda prompt: "=" * 2 * LONGEST + f"{sum(numbers(prompt))}{END}", tokenizer=TOKENIZER)
    assert {episode.reward for group in play(long, sums_url).groups for episode in group} == {0.0}
    fits = Completions(lambda prompt: "=" * (LONGEST - 2) + f"{sum(numbers(prompt)):02}{END}", tokenizer=TOKENIZER)
    assert {episode.reward for group in play(fits, sums_url).groups for episode in group} == {1.0}


class Again:
    """A producer of one rollout, over and over."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def take(self, timeout: float) -> Rollout:
        return self.rollout


def test_a_model_from_a_config_learns_and_the_bucket_ends_with_its_weights(sums_url: str, tmp_path: Path) -> None:
    rollout = play(Completions(Half(), tokenizer=TOKENIZER), sums_url)
    batch, model = as_batch(rollout), build_model()
    good = batch.advantages > 0

    def likelier() -> float:
        """How much likelier the right answers are than the wrong ones, in nats a token."""
        with torch.no_grad():
            logprobs = torch.log_softmax(model(batch.ids).logits[:, :-1], -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        each = (logprobs * batch.mask).sum(1) / batch.mask.sum(1)
        return float(each[good].mean() - each[~good].mean())

    before, bucket = likelier(), dw.open_bucket("memory://sums", create=True)
    with dw.Publisher(bucket) as publisher:
        acts, bounds = [Act("learn", 1e-3, 6)], Bounds(99, 60.0)
        _, *steps, done = train(model, publisher, Again(rollout), acts, bounds, learning=SUMS.learning)  # type: ignore[arg-type]
    assert likelier() > before
    assert [step["win_rate"] for step in steps] == [0.5] * 6
    assert all(0 < step["changed_fraction"] <= 1 and step["delta_bytes"] > 0 for step in steps)
    dw.materialize(bucket, tmp_path / "newest")
    stored = dw.digest(Checkpoint(tmp_path / "newest"))
    assert {name: f"{value:016x}" for name, value in stored.items()} == served_digests(model)
    assert done["version"] == 6


def test_an_exam_asks_what_was_held_out_as_any_client_would(sums_url: str) -> None:
    vllm = Completions(lambda prompt: f"{sum(numbers(prompt)) - (numbers(prompt) == [6, 6])}{END}", ["r:7"], TOKENIZER)

    async def examine() -> dict[str, object]:
        async with vllm.serve() as url:
            return await ask(url, "policy")

    exam = asyncio.run(examine())
    assert exam["weights"] == "r:7"
    answers = [(each["question"], each["answer"], each["right"]) for each in exam["answers"]]  # type: ignore[attr-defined]
    assert answers[0] == ("What is 7 + 8?", "15", True)
    assert [right for _, _, right in answers] == [True, True, True, False, True, True]
    assert {request["temperature"] for request in vllm.requests} == {0.0}
    vllm.fault = 500
    with pytest.raises(ClientResponseError):
        asyncio.run(examine())
