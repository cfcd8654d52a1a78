"""Asynchronous GRPO on CPU whose weights leave only through a bucket: every optimizer step publishes what changed.

    python -m examples.wordle.trainer --model DIR --bucket URL --engine http://127.0.0.1:8000 \\
        --environment http://127.0.0.1:8001 --act learn,5e-4,60 --act rl,2e-6,20 --metrics steps.jsonl

The trainer holds fp32 master weights. It reads rollouts from vLLM and never writes to it: vLLM follows the bucket, and
`/weight_info` tells which version played, so the trainer can drop what is too stale.

Each act trains on from the weights of the one before, with Adam's moments anew, as a run at that learning rate would
begin. What it publishes is the fp32 master rounded to bf16: at 2e-6 a step is smaller than half a bf16 step for most
weights, so most of their bits stay, although every master weight moves.

Killed and started again, it trains on from the newest version in the bucket and leaves out the steps that led there.
Nothing else is kept: what the masters held beyond bf16, and Adam's moments, begin anew.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch
from examples.wordle.learner import Learning, as_batch, new_optimizer, optimize
from examples.wordle.lines import Lines
from examples.wordle.producer import Producer
from examples.wordle.rollouts import Player, Rollout, ServerError, Speech
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import deltawire as dw
from deltawire.buckets.base import Bucket
from deltawire.errors import DeltaWireError, NotFound

NEVER_UPDATED = "default"
"""vLLM's version label until its first update."""


@dataclass(frozen=True, slots=True)
class Game:
    """What the trainer has to know of a game and its policy. A rollout has `groups` seeds and `members` games from
    each; `threads` are torch's on the CPU, None to leave them to OMP_NUM_THREADS."""

    speech: Callable[[PreTrainedTokenizerBase], Speech]
    learning: Learning
    groups: int = 8
    members: int = 8
    threads: int | None = None
    device: str = "cpu"


WORDLE = Game(Lines, Learning(entropy_bonus=0.02), threads=1)
"""without a bonus for entropy this toy settles on a word or two and stops trying others"""


@dataclass(frozen=True, slots=True)
class Act:
    """A stretch of training at one learning rate."""

    name: str
    learning_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many versions old a rollout may be, and how many seconds to wait for one that is not older."""

    max_staleness: int
    patience: float


@dataclass(frozen=True, slots=True)
class Fresh:
    """A rollout young enough to learn from: how many versions old, and how many older ones were dropped before it."""

    rollout: Rollout
    staleness: int
    dropped: int


def staleness(label: str, newest: dw.PublishReport, first: int) -> int | None:
    """Versions, each an optimizer step, between the one `label` names and the newest; None if it is of another run.

    Until its first update vLLM serves the checkpoint both sides started from, which is version `first`.
    """
    if label == NEVER_UPDATED:
        return newest.version - first
    run, _, version = label.rpartition(":")
    return newest.version - int(version) if run == newest.run and version.isdecimal() else None


def take_fresh(producer: Producer, newest: dw.PublishReport, first: int, bounds: Bounds) -> Fresh:
    """The next rollout within the bounds. Raises ServerError when none comes in time, and what stopped the player."""
    deadline = time.monotonic() + bounds.patience
    served, dropped = "nothing yet", 0
    while (left := deadline - time.monotonic()) > 0:
        with suppress(TimeoutError):
            rollout = producer.take(left)
            served = rollout.version_before
            age = staleness(served, newest, first)
            if age is not None and age <= bounds.max_staleness:
                return Fresh(rollout, age, dropped)
            dropped += 1
    raise ServerError(
        f"no rollout of the last {bounds.max_staleness} versions in {bounds.patience:g} s: vLLM played with {served}, "
        f"the newest is {newest.run}:{newest.version}; is `deltawire follow` running against the same bucket?"
    )


def steps_done(bucket: Bucket, folder: Path) -> int:
    """How many steps the bucket's newest version is from the start; `folder` then holds it as a checkpoint. 0, and no
    folder, while nothing is published."""
    try:
        version = dw.materialize(bucket, folder).position.version
    except NotFound:
        return 0
    with dw.Subscriber(bucket) as subscriber:
        return next(commit.step or 0 for commit in subscriber.commits() if commit.version == version)


def remaining(acts: Sequence[Act], done: int) -> Iterator[Act]:
    """What is left of the acts after `done` steps."""
    for act in acts:
        left = max(act.steps - done, 0)
        done -= act.steps - left
        if left:
            yield replace(act, steps=left)


def train(
    model: torch.nn.Module,
    publisher: dw.Publisher,
    producer: Producer,
    acts: Sequence[Act],
    bounds: Bounds,
    *,
    learning: Learning = WORDLE.learning,
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """Play the acts but for the first `done` steps: what happened, first when the starting weights are published, then
    at each optimizer step."""
    newest = publisher.publish(model, step=done)
    first, step = newest.version, done
    device = next(model.parameters()).device.type
    yield {"event": "start", "run": newest.run, "version": first, "step": done, "anchor_bytes": newest.wire_bytes}
    for act in remaining(acts, done):
        optimizer = new_optimizer(model, act.learning_rate)
        for _ in range(act.steps):
            step += 1
            started = time.monotonic()
            fresh = take_fresh(producer, newest, first, bounds)
            taken = time.monotonic()
            learned = optimize(model, optimizer, as_batch(fresh.rollout, device), learning)
            trained = time.monotonic()
            played = outcome(fresh.rollout)
            newest = publisher.publish(model, step=step, metrics=played)
            yield {
                "event": "step",
                "act": act.name,
                "learning_rate": act.learning_rate,
                "step": step,
                **played,
                **learned,
                **origin(fresh),
                **sizes(newest),
                "seconds": {
                    "rollout": fresh.rollout.seconds,  # played while the step before was trained
                    "wait": taken - started,
                    "train": trained - taken,
                    "publish": newest.seconds,
                },
            }
    publisher.flush()
    yield {"event": "done", "run": newest.run, "version": newest.version, "steps": step}


def outcome(rollout: Rollout) -> dict[str, float]:
    """How well the episodes went, on average."""
    episodes = [episode for group in rollout.groups for episode in group]
    return {
        "reward": fmean(episode.reward for episode in episodes),
        "win_rate": fmean(episode.won for episode in episodes),
        "turns": fmean(episode.turns for episode in episodes),
    }


def origin(fresh: Fresh) -> dict[str, Any]:
    """Which weights played."""
    return {
        "staleness": fresh.staleness,
        "dropped": fresh.dropped,
        "version_before": fresh.rollout.version_before,
        "version_after": fresh.rollout.version_after,
    }


def sizes(report: dw.PublishReport) -> dict[str, Any]:
    """What the step's publish came to, in elements and bytes."""
    return {
        "version": report.version,
        "changed_fraction": report.density,
        "delta_bytes": report.wire_bytes,
        "model_bytes": report.model_bytes,
        "waiting_versions": report.waiting,
        "upload_problem": report.problem,
    }


def served_digests(model: torch.nn.Module) -> dict[str, str]:
    """The digest of each weight as a server holds it, in bf16: 16 hex digits, for an audit of that server."""
    tensors = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
    return {name: f"{value:016x}" for name, value in dw.digest(tensors).items()}


def parse_act(text: str) -> Act:
    """From `name,learning rate,steps`. Raises ArgumentTypeError."""
    try:
        name, rate, steps = text.split(",")
        return Act(name.strip(), float(rate), int(steps))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not name,learning rate,steps, as learn,5e-4,60") from None


def parse_arguments(game: Game) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint both sides start from")
    parser.add_argument("--bucket", required=True, help="where to publish: hf://buckets/…, file:///…, s3://…")
    parser.add_argument("--engine", required=True, help="URL of the vLLM server")
    parser.add_argument("--served-model-name", default="policy")
    parser.add_argument("--environment", required=True, help="URL of the environment server")
    parser.add_argument("--act", action="append", type=parse_act, required=True, help="name,learning rate,steps")
    parser.add_argument("--metrics", type=Path, help="a JSON line for each step; else to standard output")
    parser.add_argument("--digests", type=Path, help="where to write the digests of the final weights")
    parser.add_argument("--groups", type=int, default=game.groups, help="seeds in a rollout")
    parser.add_argument("--members", type=int, default=game.members, help="games from each seed")
    parser.add_argument("--max-staleness", type=int, default=6, help="drop rollouts begun more steps ago")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for one that is not")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for both servers to be there at first")
    return parser.parse_args()


def run(arguments: argparse.Namespace, game: Game, metrics: IO[str]) -> None:
    """Train from the checkpoint, or on from what the bucket holds; write each record to `metrics` as it happens."""
    bucket = dw.open_bucket(arguments.bucket, create=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with TemporaryDirectory() as scratch:
        done = steps_done(bucket, newest := Path(scratch) / "newest")
        start = newest if newest.exists() else arguments.model
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.to(game.device)

    def make_player() -> Player:
        return Player(
            arguments.engine,
            arguments.environment,
            game.speech(tokenizer),
            model=arguments.served_model_name,
            groups=arguments.groups,
            members=arguments.members,
            timeout=arguments.patience,
            wait=arguments.wait,
        )

    with (
        dw.Publisher(bucket, assets=arguments.model) as publisher,
        Producer(make_player, groups=arguments.groups) as producer,
    ):
        bounds = Bounds(arguments.max_staleness, arguments.patience)
        for record in train(model, publisher, producer, arguments.act, bounds, learning=game.learning, done=done):
            if record["event"] == "done" and arguments.digests is not None:
                arguments.digests.write_text(json.dumps(served_digests(model), indent=1), encoding="utf-8")
            print(json.dumps(record), file=metrics, flush=True)


def main(game: Game = WORDLE) -> int:
    arguments = parse_arguments(game)
    if game.threads is not None:
        torch.set_num_threads(game.threads)
    disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with arguments.metrics.open("a", encoding="utf-8") if arguments.metrics else nullcontext(sys.stdout) as metrics:
            run(arguments, game, metrics)
    except (ServerError, DeltaWireError, OSError) as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
