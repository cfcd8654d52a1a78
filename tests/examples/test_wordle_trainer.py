"""The trainer: how stale is too stale, what a step does to weights and bucket, and how it ends when it cannot go on."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from completions import TOKENIZER, Completions
from examples.wordle.learner import Learning, as_batch, optimize
from examples.wordle.model import Recipe, build_model, write_checkpoint
from examples.wordle.producer import Producer
from examples.wordle.rollouts import Episode, Rollout, ServerError
from examples.wordle.trainer import Act, Bounds, parse_act, remaining, served_digests, staleness, take_fresh, train
from waiting import until

import deltawire as dw
from deltawire.buckets import Bucket
from deltawire.errors import NotFound

ROOT = Path(__file__).parents[2]
TINY = Recipe(steps=2, batch=4, hidden=64, layers=1)


def game(guess: str, reward: float) -> Episode:
    """An episode of one guess, as if the policy had chosen it with probability 1 in 34 a token."""
    episode = Episode()
    episode.read([TOKENIZER.bos_token_id])
    episode.wrote(TOKENIZER.encode(guess + "\n"), [-3.5] * (len(guess) + 1))
    episode.read(TOKENIZER.encode("XXX\n"))
    episode.reward, episode.won = reward, reward == 1.0
    return episode


def rollout(version: str = "default") -> Rollout:
    """One group: `cat` wins, `dog` does not."""
    return Rollout(((game("cat", 1.0), game("dog", 0.0)),), version, version, seconds=0.5)


def published(version: int, run: str = "r1") -> dw.PublishReport:
    about = {"changed": 1, "total": 10, "wire_bytes": 5, "model_bytes": 20, "seconds": 0.1, "compare_seconds": 0.0}
    return dw.PublishReport(run, version, version, **about, waiting=0, waiting_bytes=0, waiting_bound=20, problem=None)


class ScriptedPlayer:
    """A player whose rollouts come from a script, over and over its last; raises what it is given to raise."""

    def __init__(self, script: Sequence[Rollout | Exception]) -> None:
        self.script = list(script)
        self.seeds: list[int] = []

    async def __aenter__(self) -> "ScriptedPlayer":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def play(self, first_seed: int) -> Rollout:
        self.seeds.append(first_seed)
        item = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(item, Exception):
            raise item
        return item


def producing(*script: Rollout | Exception) -> Producer:
    return Producer(lambda: ScriptedPlayer(script), groups=8)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("label", "age"),
    [("r1:12", 0), ("r1:5", 7), ("default", 9), ("r2:12", None), ("r1:", None), ("nonsense", None)],
)
def test_staleness_counts_versions_of_this_run_and_takes_a_server_never_updated_for_the_first(
    label: str, age: int | None
) -> None:
    assert staleness(label, published(12), first=3) == age


def test_rollouts_too_stale_or_of_another_run_are_dropped_and_counted() -> None:
    with producing(rollout("r1:1"), rollout("other:12"), rollout("r1:9")) as producer:
        fresh = take_fresh(producer, published(12), 0, Bounds(max_staleness=4, patience=30.0))
    assert (fresh.rollout.version_before, fresh.staleness, fresh.dropped) == ("r1:9", 3, 2)


def test_when_vllm_follows_no_more_the_error_tells_both_versions_and_asks_for_the_follower() -> None:
    with (
        producing(rollout("r1:1")) as producer,
        pytest.raises(ServerError, match=r"played with r1:1, the newest is r1:12; is `deltawire follow` running"),
    ):
        take_fresh(producer, published(12), 0, Bounds(max_staleness=4, patience=0.2))


def test_what_stops_the_player_reaches_the_trainer() -> None:
    with producing(ServerError("vLLM is gone")) as producer, pytest.raises(ServerError, match="vLLM is gone"):
        producer.take(timeout=90.0)


def test_the_next_rollout_is_begun_when_one_is_taken_not_before() -> None:
    player = ScriptedPlayer([rollout()])
    with Producer(lambda: player, groups=8) as producer:  # type: ignore[arg-type, return-value]
        for taken in range(1, 4):
            producer.take(timeout=90.0)
            assert len(player.seeds) <= taken + 1
    assert player.seeds[:3] == [0, 8, 16]


def test_a_batch_pads_episodes_and_keeps_what_the_policy_chose() -> None:
    short, long = game("cat", 1.0), game("dog", 0.0)
    long.wrote(TOKENIZER.encode("sun\n"), [-1.0] * 4)
    batch = as_batch(Rollout(((short, long),), "a", "a", 0.0))
    assert batch.ids.shape == (2, 13)
    assert batch.mask.shape == batch.behaviour.shape == (2, 12)
    assert batch.mask.sum(dim=1).tolist() == [4.0, 8.0]
    assert batch.behaviour.sum(dim=1).tolist() == [-14.0, -18.0]
    assert batch.advantages[0] == -batch.advantages[1] > 0


def test_a_step_in_parts_is_the_step_of_the_whole_batch() -> None:
    long = game("cat", 0.3)
    long.wrote(TOKENIZER.encode("sun\n"), [-1.0] * 4)
    batch = as_batch(Rollout(((game("cat", 1.0), game("dog", 0.0), long),), "a", "a", 0.0))
    whole, parts = build_model(TINY, TOKENIZER), build_model(TINY, TOKENIZER)
    seen = [
        optimize(model, torch.optim.SGD(model.parameters(), 0.1), batch, Learning(entropy_bonus=0.02, rows=rows))
        for model, rows in ((whole, 3), (parts, 2))
    ]
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_every_step_publishes_and_the_bucket_ends_with_the_models_weights_in_bf16() -> None:
    model = build_model(TINY, TOKENIZER)
    bucket = dw.open_bucket("memory://wordle-trainer", create=True)
    acts = [Act("learn", 1e-2, 3), Act("rl", 2e-6, 2)]
    with dw.Publisher(bucket) as publisher, producing(rollout()) as producer:
        start, *steps, done = train(model, publisher, producer, acts, Bounds(max_staleness=9, patience=30.0))
    assert (start["event"], start["version"]) == ("start", 0)
    assert [(step["act"], step["version"], step["staleness"]) for step in steps] == [
        ("learn", 1, 0), ("learn", 2, 1), ("learn", 3, 2), ("rl", 4, 3), ("rl", 5, 4)
    ]  # fmt: skip
    assert (done["event"], done["version"]) == ("done", 5)
    assert steps[0]["reward"] == steps[0]["win_rate"] == 0.5
    assert steps[-1]["changed_fraction"] < 0.1 < steps[0]["changed_fraction"]
    assert all(step["delta_bytes"] > 0 and step["upload_problem"] is None for step in steps)
    json.dumps(steps)
    with dw.Subscriber(bucket) as subscriber:
        assert subscriber.latest().version == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("done", "left"),
    [(0, [("learn", 3), ("rl", 2)]), (2, [("learn", 1), ("rl", 2)]), (3, [("rl", 2)]), (4, [("rl", 1)]), (9, [])],
)
def test_a_trainer_that_starts_again_leaves_out_the_steps_it_did(done: int, left: list[tuple[str, int]]) -> None:
    acts = remaining([Act("learn", 1e-2, 3), Act("rl", 2e-6, 2)], done)
    assert [(act.name, act.steps) for act in acts] == left


def test_learning_makes_the_guess_that_won_more_likely() -> None:
    model = build_model(TINY, TOKENIZER)
    bucket = dw.open_bucket("memory://wordle-learns", create=True)

    def likely(guess: str) -> float:
        ids = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER.encode(guess)]])
        with torch.no_grad():
            return float(torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None]).sum())

    before = likely("cat") - likely("dog")
    with dw.Publisher(bucket) as publisher, producing(rollout()) as producer:
        list(train(model, publisher, producer, [Act("learn", 1e-3, 5)], Bounds(9, 30.0)))
    assert likely("cat") - likely("dog") > before + 0.5


def test_the_digests_for_the_audit_are_those_of_the_weights_rounded_to_bf16() -> None:
    model = build_model(TINY, TOKENIZER)
    digests = served_digests(model)
    assert digests.keys() == dict(model.named_parameters()).keys()
    norm = model.model.norm.weight.detach().to(torch.bfloat16)
    assert digests["model.norm.weight"] == f"{dw.digest({'w': norm})['w']:016x}"


def test_an_act_is_read_from_its_three_parts_and_anything_else_is_explained() -> None:
    assert parse_act("learn,5e-4,60") == Act("learn", 5e-4, 60)
    with pytest.raises(Exception, match=r"'learn,fast' is not name,learning rate,steps"):
        parse_act("learn,fast")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(folder, TINY)
    return folder


@pytest.fixture
def vllm_url() -> Iterator[Callable[[Completions], str]]:
    """Serves a stand-in for vLLM from a thread, so that the trainer can be a process of its own."""
    stop = threading.Event()
    threads = []

    def serve(vllm: Completions) -> str:
        url, up = [], threading.Event()

        async def run() -> None:
            async with vllm.serve() as address:
                url.append(address)
                up.set()
                await asyncio.to_thread(stop.wait)

        threads.append(threading.Thread(target=asyncio.run, args=(run(),)))
        threads[-1].start()
        assert up.wait(90.0)
        return url[0]

    yield serve
    stop.set()
    for thread in threads:
        thread.join()


@contextmanager
def trainer(checkpoint: Path, out: Path, engine: str, environment: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command under way, which does not outlive the test."""
    arguments = {
        "--model": checkpoint, "--bucket": (out / "bucket").as_uri(), "--engine": engine, "--environment": environment,
        "--metrics": out / "steps.jsonl", "--digests": out / "digests.json", "--groups": 2, "--members": 2,
        "--max-staleness": 1000,
    }  # fmt: skip
    command = [sys.executable, "-m", "examples.wordle.trainer", *(str(x) for pair in arguments.items() for x in pair)]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [*command, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_steps(told: Path, process: subprocess.Popen[str]) -> None:
    """Return once the command, still under way, has told of three steps."""

    def enough() -> bool:
        return told.is_file() and told.read_text().count("\n") > 3

    until(enough, seconds=240, unless=lambda: process.poll() is not None)


def wait_for_committed_step(bucket: Bucket, process: subprocess.Popen[str]) -> None:
    """Return once the bucket holds a step: the command, still under way, tells of one before it is durable."""

    def committed() -> bool:
        with suppress(NotFound), dw.Subscriber(bucket) as subscriber:
            return any(commit.step for commit in subscriber.commits())
        return False

    until(committed, seconds=240, unless=lambda: process.poll() is not None)


def dog(prompt: Sequence[int]) -> str:
    return "dog\n"


def test_the_command_writes_a_line_a_step_and_the_digests_that_the_bucket_materializes_to(
    checkpoint: Path, tmp_path: Path, environment_url: str, vllm_url: Callable[[Completions], str]
) -> None:
    from safetensors.torch import load_file

    url = vllm_url(Completions(dog))
    with trainer(checkpoint, tmp_path, url, environment_url, "--act", "learn,1e-3,2", "--act", "rl,2e-6,1") as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    records: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["start", "step", "step", "step", "done"]
    dw.materialize(dw.open_bucket((tmp_path / "bucket").as_uri()), tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert json.loads((tmp_path / "digests.json").read_text()) == {
        name: f"{value:016x}" for name, value in dw.digest(stored).items()
    }


def test_the_command_ends_with_one_clear_line_when_vllm_is_not_there(
    checkpoint: Path, tmp_path: Path, environment_url: str
) -> None:
    with trainer(checkpoint, tmp_path, "http://127.0.0.1:9", environment_url, "--act", "learn,1e-3,2") as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert errors.startswith("trainer: http://127.0.0.1:9/weight_info: ")
    assert len(errors.splitlines()) == 1


def test_a_killed_trainer_started_again_goes_on_from_the_buckets_newest_version(
    checkpoint: Path, tmp_path: Path, environment_url: str, vllm_url: Callable[[Completions], str]
) -> None:
    url = vllm_url(Completions(dog))
    steps, bucket = tmp_path / "steps.jsonl", dw.open_bucket((tmp_path / "bucket").as_uri())
    with trainer(checkpoint, tmp_path, url, environment_url, "--act", "learn,1e-3,100000") as process:
        wait_for_committed_step(bucket, process)
        process.kill()
    with dw.Subscriber(bucket) as subscriber:
        last = subscriber.commits()[-1]
    assert last.step
    lines = len(steps.read_text().splitlines())
    with trainer(checkpoint, tmp_path, url, environment_url, "--act", f"learn,1e-3,{last.step + 1}") as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    start, step, done = [json.loads(line) for line in steps.read_text().splitlines()[lines:]]
    assert (start["run"], start["step"], start["version"]) == (last.run, last.step, last.version + 1)
    assert (step["step"], done["steps"]) == (last.step + 1, last.step + 1)
    with dw.Subscriber(bucket) as subscriber:
        resumed = next(commit for commit in subscriber.commits() if commit.version == start["version"])
    assert resumed.root == last.root  # it began with the very bits that the killed one published last


def test_a_terminated_trainer_leaves_a_bucket_that_holds_every_step_it_told(
    checkpoint: Path, tmp_path: Path, environment_url: str, vllm_url: Callable[[Completions], str]
) -> None:
    url = vllm_url(Completions(dog))
    with trainer(checkpoint, tmp_path, url, environment_url, "--act", "learn,1e-3,100000") as process:
        steps = tmp_path / "steps.jsonl"
        wait_for_steps(steps, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    last = json.loads(steps.read_text().splitlines()[-1])
    with dw.Subscriber(dw.open_bucket((tmp_path / "bucket").as_uri())) as subscriber:
        assert subscriber.latest().version >= last["version"]  # type: ignore[union-attr]
