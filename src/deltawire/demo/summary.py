"""The figures of a demo: what the trainer and the follower reported, boiled down to summary.json. Pure functions."""

from collections.abc import Sequence
from statistics import fmean, median

import msgspec

WINDOW = 10
"""steps that "first" and "last" average over"""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step, a line of the trainer's metrics file: what was trained on, and what was published."""

    act: str
    learning_rate: float
    step: int
    reward: float
    win_rate: float
    staleness: int
    """optimizer steps between the weights that played and those just published"""
    version: int
    changed_fraction: float
    """share of the weights this step's version changed, 0 to 1"""
    delta_bytes: int
    model_bytes: int


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One version that vLLM came to serve, a line of the follower's output."""

    version: int
    changed: int
    wire_bytes: int
    pause_ms: float
    publish_to_served_s: float
    verified: bool


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """A question, what the model said to it, and whether that is right."""

    question: str
    answer: str
    right: bool


class Exam(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM answered at one version of its weights to questions that nobody trained on."""

    weights: str
    """its label of the version: RUN:VERSION, or "default" before its first update"""
    answers: list[Answered]

    @property
    def right(self) -> int:
        """How many of the answers are right."""
        return sum(answered.right for answered in self.answers)


class ActSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An act: medians over its versions, means over its first and last steps."""

    name: str
    learning_rate: float
    versions: int
    changed_fraction: float
    delta_bytes: float
    reward_first: float
    reward_last: float
    win_rate_first: float
    win_rate_last: float


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """The last version as each party holds it: vLLM's live memory and the checkpoint materialized from the bucket, each
    compared in `tensors` tensors with the trainer's own weights; and `checksums` parameters of vLLM compared with those
    of a server freshly started on that checkpoint. The lists name what differs or what one side lacks."""

    version: int
    tensors: int
    vllm_differs: list[str]
    bucket_differs: list[str]
    checksums: int
    fresh_server_differs: list[str]

    @property
    def equal(self) -> bool:
        """Whether there was something to compare, and all of it is the same."""
        differs = self.vllm_differs + self.bucket_differs + self.fresh_server_differs
        return self.tensors > 0 and self.checksums > 0 and not differs


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the bucket server counted."""

    received_bytes: int
    deduplicated_bytes: int


class DemoSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a demo showed.

    `reward_first` and `win_rate_first` are means over the first ten steps of the demo, `…_last` over the last ten of
    the first act, whose learning rate lets this toy learn; each act has its own beside them. `changed_fraction` and
    `delta_bytes` of an act are medians over the versions it published; `pause_ms` and `publish_to_served_s` are medians
    over the updates vLLM took; `staleness` is a mean over all steps.
    """

    reward_first: float
    reward_last: float
    win_rate_first: float
    win_rate_last: float
    versions: int
    model_bytes: int
    delta_bytes: int
    """of all versions together"""
    acts: list[ActSummary]
    updates: int
    pause_ms: float
    publish_to_served_s: float
    staleness: float
    audit_equal: bool
    audit: Audit
    server_received_bytes: int
    server_deduplicated_bytes: int
    seconds: float
    exams: list[Exam] = []
    """before the first step and after the last, where the game has an exam"""
    trainer_connected_to_vllm_for_weights: bool = False
    """A constant, not a measurement: the trainer is started with the bucket's URL and the URL it reads rollouts from,
    and asks vLLM for nothing else; the process that asks for updates is the follower, which knows no trainer."""


def summarize(
    steps: Sequence[Step],
    served: Sequence[Served],
    audit: Audit,
    traffic: Traffic,
    *,
    seconds: float,
    exams: Sequence[Exam] = (),
) -> DemoSummary:
    """The figures. Raises ValueError if no step was taken or no update served: there would be nothing to show."""
    if not steps or not served:
        raise ValueError(f"{len(steps)} steps and {len(served)} updates: a demo needs at least one of each")
    acts = [summarize_act([step for step in steps if step.act == name]) for name in dict.fromkeys(s.act for s in steps)]
    return DemoSummary(
        reward_first=acts[0].reward_first,
        reward_last=acts[0].reward_last,
        win_rate_first=acts[0].win_rate_first,
        win_rate_last=acts[0].win_rate_last,
        versions=len({step.version for step in steps}),
        model_bytes=steps[-1].model_bytes,
        delta_bytes=sum({step.version: step.delta_bytes for step in steps}.values()),
        acts=acts,
        updates=len(served),
        pause_ms=median(update.pause_ms for update in served),
        publish_to_served_s=median(update.publish_to_served_s for update in served),
        staleness=fmean(step.staleness for step in steps),
        audit_equal=audit.equal,
        audit=audit,
        server_received_bytes=traffic.received_bytes,
        server_deduplicated_bytes=traffic.deduplicated_bytes,
        seconds=seconds,
        exams=list(exams),
    )


def summarize_act(steps: Sequence[Step]) -> ActSummary:
    """One act's figures, from its steps in order; at least one."""
    first, last = steps[:WINDOW], steps[-WINDOW:]
    return ActSummary(
        name=steps[0].act,
        learning_rate=steps[0].learning_rate,
        versions=len({step.version for step in steps}),
        changed_fraction=median(step.changed_fraction for step in steps),
        delta_bytes=median(step.delta_bytes for step in steps),
        reward_first=fmean(step.reward for step in first),
        reward_last=fmean(step.reward for step in last),
        win_rate_first=fmean(step.win_rate for step in first),
        win_rate_last=fmean(step.win_rate for step in last),
    )
