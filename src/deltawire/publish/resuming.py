"""Whether a trainer that continues a run begins from where the run stood.

What the run looked like, and what to say of a first publish that jumps.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deltawire.buckets.base import Bucket
from deltawire.errors import FormatError, NotFound, WrongBase
from deltawire.format import checkpoint
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Commit, Position

LOOK_BACK = 8
"""commits that the usual size of a version is taken from"""
JUMP = 4.0
"""times the usual bytes from which a first publish counts as a jump. The first step of a fresh AdamW changes about four
times as many weights as later ones. At a rate of 1e-6 it was 4.2 %, where 1 % is usual (benchmarks/first_steps.py)."""
ADAPTER_FIELDS = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "fan_in_fan_out", "target_parameters")
"""fields of an adapter_config.json that say how an adapter's tensors change the model, where names and shapes do not"""


@dataclass(frozen=True, slots=True)
class RunState:
    """What a continued run looked like: where it stood, and the trainer's step there.

    `first_root` is the root of version 0, None where it was pruned. `usual_bytes` is the median of the newest deltas,
    None without any.
    """

    position: Position
    step: int | None
    first_root: str | None
    usual_bytes: float | None


def run_state(bucket: Bucket, position: Position) -> RunState:
    """How the run stood at its newest commit. Reads at most LOOK_BACK + 2 records. Raises BucketError, FormatError."""
    with Subscriber(bucket) as subscriber:
        newest = commit = subscriber.chain.commit(position.version).record
        sizes: list[int] = []
        first: Commit | None = None
        with suppress(NotFound):  # pruned
            while commit.parent is not None and len(sizes) < LOOK_BACK:
                sizes += [commit.wire_bytes] if commit.wire_bytes else []
                commit = subscriber.chain.commit(commit.parent).record
        with suppress(NotFound):
            first = subscriber.chain.commit(0).record
    first_root = first.root if first is not None else None
    return RunState(position, newest.step, first_root, median(sizes) if sizes else None)


def jump(before: RunState, *, root: str, step: int | None, changed: int, total: int, wire_bytes: int) -> str | None:
    """What is wrong with the first publish of a continued run, as a sentence with the figures; None where it fits.

    `root` is that of the weights it gave.
    """
    if root == before.position.root:
        return None
    beginning = root == before.first_root
    times = wire_bytes / before.usual_bytes if before.usual_bytes else 0.0
    if not beginning and times <= JUMP:
        return None
    facts = [f"it changes {changed:,} of {total:,} weights"]
    facts += [f"{times:.1f} times the bytes of a usual version"] if times else []
    facts += ["they are those of version 0, bit for bit"] if beginning else []
    if step is not None and before.step is not None and step < before.step:
        facts += [f"it is step {step} where the run stood at step {before.step}"]
    return (
        f"the first publish does not look like a continuation of run {before.position.run} at version "
        f"{before.position.version}: {', '.join(facts)}. Servers go back to what it holds. If the trainer was "
        "restarted from its base, restart it from its checkpoint"
    )


def require_same_adapter(subscriber: Subscriber, assets: Path | None) -> None:
    """Raise WrongBase unless the adapter config in `assets` gives each tensor the meaning that the run's config gives.

    By its `target_parameters` one key is an expert's up or down projection, and its shape need not show which.
    """
    if assets is None or not checkpoint.is_adapter(subscriber.run.table):
        return
    given = assets / checkpoint.ADAPTER_CONFIG
    filed = [path for path in subscriber.anchor_files() if path.name == checkpoint.ADAPTER_CONFIG]
    if not (filed and given.is_file()):
        return
    ours, theirs = _meaning(given), _meaning(filed[0])
    if other := [name for name in ADAPTER_FIELDS if ours[name] != theirs[name]]:
        said = "; ".join(f"{name} is {theirs[name]!r} there, {ours[name]!r} here" for name in other)
        raise WrongBase(
            f"{subscriber.bucket.url}: run {subscriber.run.run} is of another adapter than {given}: {said}. Publish it "
            'to another bucket, or begin a new run: Publisher(run="supersede")'
        )


def _meaning(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
        fields = {name: config.get(name) for name in ADAPTER_FIELDS}
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not an adapter's config ({error!r})") from None
    return {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in fields.items()}
