"""What a rollout loop notes of each answer: the loop is a double of TRL's, its HTTP is real. tests/vllm has TRL."""

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from deltawire.trainers.policies import LAG, NEWEST, OLDEST, log_lag, make_loop, record_policies, span_of


@dataclass
class Sequence:
    rollout_id: str


@dataclass
class Sample:
    metrics: dict = field(default_factory=lambda: {"reward": 1.0})


class Loop:
    """TRL's rollout loop, as far as notes are taken of it: a conversation is `turns` requests, one sequence each."""

    def __init__(self, *, url, turns):
        self.url, self.turns, self.session = url, turns, None

    async def _post(self, path, payload, timeout, max_retries=3):
        async with self.session.post(self.url + path, json=payload) as response:
            return await response.json()

    async def _generate_one(self, prompt, *, group_id=0):
        for _ in range(self.turns):
            await self._post("/v1/completions", {"prompt": prompt}, 120)
        return [], [], [Sequence(f"{prompt} {turn}") for turn in range(self.turns)], 0, 0, None

    async def _score_group(self, group):
        return [Sample() for sequences in group.completions_sequences for _ in sequences]

    async def run(self, prompts):
        async with aiohttp.ClientSession() as self.session:
            made = await asyncio.gather(*(asyncio.create_task(self._generate_one(prompt)) for prompt in prompts))
        return await self._score_group(SimpleNamespace(completions_sequences=[one[2] for one in made]))


def play(answers, *, turns=1, run="ab"):
    """The samples of one conversation for each list of answers, (body, headers) in turn."""
    waiting, asked = {prompt: list(each) for prompt, each in answers.items()}, []

    async def answer(request):
        body = await request.json()
        asked.append(body)
        said, headers = waiting[body["prompt"]].pop(0)
        return web.json_response(said, headers=headers)

    async def playing():
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            loop = make_loop(Loop, run, url=f"http://127.0.0.1:{port}", turns=turns)
            return await loop.run(answers)
        finally:
            await runner.cleanup()

    samples = asyncio.run(playing())
    assert all(body["return_weight_versions"] is True for body in asked)
    return [sample.metrics for sample in samples]


def spans(*labels):
    return {"choices": [{"weight_versions": [{"version": label, "start": 0, "end": 1} for label in labels]}]}


def headers(first, last):
    return {"X-Policy-Version": first, "X-Policy-Version-Last": last}


def test_each_sample_says_which_versions_made_it_by_the_answer_or_else_by_its_headers():
    answers = {
        "by spans": [(spans("ab:9", "ab:10"), headers("ab:8", "ab:11"))],
        "by headers": [({"choices": [{}]}, headers("ab:3", "ab:4"))],
    }
    by_spans, by_headers = play(answers)
    assert by_spans == {"reward": 1.0, OLDEST: 9.0, NEWEST: 10.0}
    assert by_headers == {"reward": 1.0, OLDEST: 3.0, NEWEST: 4.0}


def test_a_conversation_of_several_turns_is_as_old_as_its_oldest_answer():
    turns = [(spans("ab:3"), {}), ({"choices": [{}]}, headers("ab:4", "ab:5"))]
    assert play({"game": turns}, turns=2) == [{"reward": 1.0, OLDEST: 3.0, NEWEST: 5.0}] * 2


@pytest.mark.parametrize("label", ["default", "other:3", "ab:x", "ab:"])
def test_what_another_run_made_or_none_is_not_noted(label):
    assert play({"game": [(spans("ab:3", label), {})]}) == [{"reward": 1.0}]


def test_a_server_that_never_says_is_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING, "deltawire"):
        silent = {"choices": [{}]}
        assert play({"a": [(silent, {})], "b": [(silent, {})]}) == [{"reward": 1.0}] * 2
    assert [record.getMessage().count("PolicyVersion") for record in caplog.records] == [1]


def test_labels_are_compared_as_numbers():
    assert span_of({"ab:9", "ab:10"}, "ab") == (9, 10)
    assert span_of((), "ab") is None


def test_the_lag_is_of_the_version_that_was_trained_when_the_sample_was_taken():
    metrics = defaultdict(list, {OLDEST: [3.0, 4.0]})
    trainer = SimpleNamespace(_metrics={"train": metrics})
    log_lag(trainer, 5)
    metrics[OLDEST].append(5.5)
    log_lag(trainer, 6)
    assert metrics[LAG] == [2.0, 1.0, 0.5]
    metrics.clear()  # TRL has logged them
    log_lag(trainer, 7)
    assert not metrics, "no sample was noted, so no lag is logged"


@pytest.mark.parametrize("metrics", [None, {}, {"train": None}])
def test_a_trainer_that_keeps_other_metrics_logs_no_lag(metrics):
    log_lag(SimpleNamespace(_metrics=metrics), 5)
    log_lag(None, 5)


def test_only_a_worker_that_makes_its_loop_as_trl_does_is_told_to():
    worker = SimpleNamespace(_loop_cls=Loop)
    for _ in range(2):
        record_policies(SimpleNamespace(rollout_worker=worker), "ab")
    assert isinstance(worker._loop_cls, partial) and worker._loop_cls.args == (Loop, "ab")
    for other in (None, SimpleNamespace(), SimpleNamespace(_loop_cls=dict)):
        record_policies(SimpleNamespace(rollout_worker=other), "ab")
        assert getattr(other, "_loop_cls", dict) is dict
