"""Asynchronous GRPO on CPU whose weights leave only through a bucket: every optimizer step publishes what changed.

    python -m examples.wordle.trainer --model DIR --bucket URL --engine http://127.0.0.1:8000 \\
        --environment http://127.0.0.1:8001 --act learn,5e-4,60 --act rl,2e-6,20 --metrics steps.jsonl

The trainer holds fp32 master weights. It reads rollouts from vLLM and never writes to it: vLLM follows the bucket, and
`/weight_info` tells which version played, so the trainer can drop what is too stale.

Each act trains on from the weights of the one before, with Adam's moments anew, as a run at that learning rate would
begin. What it publishes is the fp32 master rounded to bf16: at 2e-6 a step is smaller than half a bf16 step for most
weights, so most of their bits stay, although every master weight moves.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import torch
from examples.wordle.grpo import clipped_loss, group_advantages, masked_mean, token_entropy, token_logprobs
from examples.wordle.producer import Producer
from examples.wordle.rollouts import Player, Rollout, ServerError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import deltawire as dw
from deltawire.errors import DeltaWireError

NEVER_UPDATED = "default"
"""vLLM's version label until its first update"""
BETAS = (0.9, 0.95)
"""Adam's: the second moment forgets in 20 steps, since rewards and gradients change fast on a toy"""


@dataclass(frozen=True, slots=True)
class Act:
    """A stretch of training at one learning rate."""

    name: str
    learning_rate: float
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Act":
        """From `name,learning rate,steps`. Raises ValueError."""
        name, rate, steps = text.split(",")
        return cls(name.strip(), float(rate), int(steps))


@dataclass(frozen=True, slots=True)
class Loss:
    """What the objective weighs: the clip range of the ratio, and how much an open policy is worth."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    entropy_bonus: float = 0.02


@dataclass(frozen=True, slots=True)
class Batch:
    """A rollout as tensors, an episode a row: ids [episodes, length]; mask and behaviour [episodes, length - 1]."""

    ids: Tensor
    mask: Tensor
    behaviour: Tensor
    advantages: Tensor


def as_batch(rollout: Rollout) -> Batch:
    """Pad the episodes to one length. Padding needs no attention mask: it comes last, and attention looks back."""
    episodes = [episode for group in rollout.groups for episode in group]

    def padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)

    rewards = torch.tensor([[episode.reward for episode in group] for group in rollout.groups])
    return Batch(
        ids=padded([episode.tokens for episode in episodes], torch.long),
        mask=padded([episode.sampled for episode in episodes], torch.float32)[:, 1:],
        behaviour=padded([episode.logprobs for episode in episodes], torch.float32)[:, 1:],
        advantages=group_advantages(rewards).flatten(),
    )


def optimize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss: Loss) -> dict[str, float]:
    """One optimizer step on one batch; what it saw."""
    logits = model(input_ids=batch.ids).logits
    logprobs = token_logprobs(logits, batch.ids)
    entropy = masked_mean(token_entropy(logits), batch.mask)
    policy_loss = clipped_loss(
        logprobs, batch.behaviour, batch.advantages, batch.mask, low=loss.clip_low, high=loss.clip_high
    )
    optimizer.zero_grad()
    (policy_loss - loss.entropy_bonus * entropy).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    off_policy = masked_mean((logprobs.detach() - batch.behaviour).abs(), batch.mask)
    return {
        "loss": policy_loss.item(),
        "entropy": entropy.item(),
        "gradient_norm": norm.item(),
        "off_policy": off_policy.item(),
    }


def staleness(label: str, report: dw.PublishReport, first: int) -> int | None:
    """Optimizer steps between the version `label` names and the one just published; None if it is of another run.

    Until its first update vLLM serves the checkpoint both sides started from, which is version `first`.
    """
    if label == NEVER_UPDATED:
        return report.version - first
    run, _, version = label.rpartition(":")
    return report.version - int(version) if run == report.run and version.isdecimal() else None


def take_fresh(
    producer: Producer, newest: dw.PublishReport, first: int, *, max_staleness: int, patience: float
) -> tuple[Rollout, int, int]:
    """The next rollout young enough to learn from, its staleness, and how many older ones were dropped for it.

    Raises ServerError when none comes in `patience` seconds, and what stopped the player.
    """
    deadline = time.monotonic() + patience
    served, dropped = "nothing yet", 0
    while (left := deadline - time.monotonic()) > 0:
        with suppress(TimeoutError):
            rollout = producer.take(left)
            served = rollout.version_before
            age = staleness(served, newest, first)
            if age is not None and age <= max_staleness:
                return rollout, age, dropped
            dropped += 1
    raise ServerError(
        f"no rollout of the last {max_staleness} versions in {patience:.0f} s: vLLM played with {served}, "
        f"the newest is {newest.run}:{newest.version}; is `deltawire follow` running against the same bucket?"
    )


def train(
    model: torch.nn.Module,
    publisher: dw.Publisher,
    producer: Producer,
    acts: Sequence[Act],
    *,
    loss: Loss,
    max_staleness: int,
    patience: float,
) -> Iterator[dict[str, Any]]:
    """Play the acts: what happened, first when the starting weights are published, then at each optimizer step."""
    report = publisher.publish(model.named_parameters(), step=0)
    first, step = report.version, 0
    yield {"event": "start", "run": report.run, "version": first, "anchor_bytes": report.wire_bytes}
    for act in acts:
        optimizer = torch.optim.AdamW(model.parameters(), lr=act.learning_rate, betas=BETAS, weight_decay=0.0)
        for _ in range(act.steps):
            clock = [time.monotonic()]
            rollout, age, dropped = take_fresh(producer, report, first, max_staleness=max_staleness, patience=patience)
            clock.append(time.monotonic())
            seen = optimize(model, optimizer, as_batch(rollout), loss)
            clock.append(time.monotonic())
            step += 1
            played = outcome(rollout)
            report = publisher.publish(model.named_parameters(), step=step, metrics=played)
            clock.append(time.monotonic())
            waited, trained, published = (after - before for before, after in pairwise(clock))
            yield {
                "event": "step",
                "act": act.name,
                "learning_rate": act.learning_rate,
                "step": step,
                "version": report.version,
                **played,
                **seen,
                "staleness": age,
                "dropped": dropped,
                "version_before": rollout.version_before,
                "version_after": rollout.version_after,
                "changed_fraction": report.density,
                "delta_bytes": report.wire_bytes,
                "model_bytes": report.model_bytes,
                "waiting_versions": report.waiting,
                "upload_problem": report.problem,
                "seconds": {
                    "rollout": rollout.seconds,
                    "wait": waited,
                    "train": trained,
                    "publish": published,
                },
            }
    publisher.flush()
    yield {"event": "done", "run": report.run, "version": report.version, "steps": step}


def outcome(rollout: Rollout) -> dict[str, float]:
    """How well the episodes went, on average."""
    episodes = [episode for group in rollout.groups for episode in group]
    return {
        "reward": fmean(episode.reward for episode in episodes),
        "win_rate": fmean(episode.won for episode in episodes),
        "turns": fmean(episode.turns for episode in episodes),
    }


def served_digests(model: torch.nn.Module) -> dict[str, str]:
    """The digest of each weight as a server holds it, in bf16: 16 hex digits, for an audit of that server."""
    tensors = {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}
    return {name: f"{value:016x}" for name, value in dw.digest(tensors).items()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint both sides start from")
    parser.add_argument("--bucket", required=True, help="where to publish: hf://buckets/…, file:///…, s3://…")
    parser.add_argument("--engine", required=True, help="URL of the vLLM server")
    parser.add_argument("--served-model-name", default="policy")
    parser.add_argument("--environment", required=True, help="URL of the environment server")
    parser.add_argument("--act", action="append", type=Act.parse, required=True, help="name,learning rate,steps")
    parser.add_argument("--metrics", type=Path, help="a JSON line for each step; else to standard output")
    parser.add_argument("--digests", type=Path, help="where to write the digests of the final weights")
    parser.add_argument("--groups", type=int, default=8, help="secrets in a rollout")
    parser.add_argument("--members", type=int, default=8, help="games about each secret")
    parser.add_argument("--max-staleness", type=int, default=6, help="drop rollouts begun more steps ago")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for one that is not")
    return parser.parse_args()


def run(arguments: argparse.Namespace, metrics: IO[str]) -> None:
    """Train from the checkpoint, and write each record to `metrics` as it happens."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)

    def make_player() -> Player:
        return Player(
            arguments.engine,
            arguments.environment,
            tokenizer,
            model=arguments.served_model_name,
            groups=arguments.groups,
            members=arguments.members,
        )

    bucket = dw.open_bucket(arguments.bucket, create=True)
    with (
        dw.Publisher(bucket, codec="gap", assets=arguments.model) as publisher,
        Producer(make_player, groups=arguments.groups) as producer,
    ):
        for record in train(
            model,
            publisher,
            producer,
            arguments.act,
            loss=Loss(),
            max_staleness=arguments.max_staleness,
            patience=arguments.patience,
        ):
            if record["event"] == "done" and arguments.digests is not None:
                arguments.digests.write_text(json.dumps(served_digests(model), indent=1), encoding="utf-8")
            print(json.dumps(record), file=metrics, flush=True)


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with arguments.metrics.open("w", encoding="utf-8") if arguments.metrics else nullcontext(sys.stdout) as metrics:
            run(arguments, metrics)
    except (ServerError, DeltaWireError, OSError) as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
