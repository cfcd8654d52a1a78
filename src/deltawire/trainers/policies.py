"""TRL's rollouts note which versions made each completion, and the trainer logs how old they are.

vLLM tells: from 0.33 on in the answer to each request, and before that by `deltawire.vllm.middleware`. TRL has no
public way to hear of it: its loop gives out token ids and log-probabilities alone. Its worker takes its loop from the
attribute `_loop_cls`, so that other workers can have another, and that is what this uses.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any

OLDEST = "deltawire/policy_oldest"
"""of a sample: the oldest version that made a token of it; in the logs, the mean over samples"""
NEWEST = "deltawire/policy_newest"
"""and the newest one"""
LAG = "deltawire/policy_lag"
"""versions between the oldest one that made a sample and the one that trains on it"""
HEADERS = ("X-Policy-Version", "X-Policy-Version-Last")
ASK = {"return_weight_versions": True}
"""passed over by vLLM before 0.33"""
SEAMS = ("_post", "_generate_one", "_score_group")
"""what TRL's rollout loop is asked by: one request, one conversation, and the samples of a group"""
_MADE_BY = "_deltawire_made_by"
"""on TRL's record of a sequence, which goes with it wherever TRL drops it: the oldest and the newest version"""


def record_policies(trainer: Any, run: str) -> None:
    """Have the rollout worker of a TRL trainer note the versions of `run` in its samples, once it starts.

    The worker makes its loop in a child process, by its class `_loop_cls`, as TRL's own harness worker has another. A
    worker without one, or whose loop works in another way, is left as it is.
    """
    worker = getattr(trainer, "rollout_worker", None)
    loop_class = getattr(worker, "_loop_cls", None)
    if isinstance(loop_class, type) and all(hasattr(loop_class, name) for name in SEAMS):
        worker._loop_cls = partial(make_loop, loop_class, run)  # type: ignore[union-attr]


def make_loop(loop_class: Callable[..., Any], run: str, **options: Any) -> Any:
    """A loop of TRL's class whose samples say which versions of `run` made them."""
    loop = loop_class(**options)
    PolicyNotes(run).attach(loop)
    return loop


def log_lag(trainer: Any, version: int) -> None:
    """Log how far behind `version` the samples were that a TRL trainer took since the last call.

    TRL takes samples a micro-batch ahead, and counts its own `sample/staleness_mean` when it takes them, too.
    """
    try:
        metrics = trainer._metrics["train"]
        if OLDEST in metrics:
            metrics[LAG].extend(version - made for made in metrics[OLDEST][len(metrics[LAG]) :])
    except (AttributeError, KeyError, TypeError):  # a trainer that keeps other metrics
        return


class PolicyNotes:
    """Which versions of `run` made the answers that one rollout loop got, until its samples say so."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._labels: ContextVar[set[str] | None] = ContextVar("labels", default=None)
        self._headers: ContextVar[list[str] | None] = ContextVar("headers", default=None)
        self._warned = False

    def attach(self, loop: Any) -> None:
        """Stand between the loop and its own methods."""
        loop._post = partial(self._post, loop, loop._post)
        loop._generate_one = partial(self._generate_one, loop._generate_one)
        loop._score_group = partial(self._score_group, loop._score_group)

    async def _post(
        self,
        loop: Any,
        post: Callable[..., Awaitable[dict[str, Any]]],
        path: str,
        payload: Any,
        *rest: Any,
        **named: Any,
    ) -> dict[str, Any]:
        """One request: what the answer says, else what its headers do."""
        self._watch(loop.session)
        headers: list[str] = []
        self._headers.set(headers)
        answer = await post(path, {**payload, **ASK}, *rest, **named)
        if (labels := self._labels.get()) is not None:
            spans = [span["version"] for choice in answer.get("choices", ()) for span in _spans(choice)]
            labels.update(spans or headers)
            self._warn_of_silence(bool(labels))
        return answer

    async def _generate_one(self, generate: Callable[..., Awaitable[Any]], *given: Any, **named: Any) -> Any:
        """One conversation, of one or several requests. Each is a task, with a context of its own."""
        labels: set[str] = set()
        self._labels.set(labels)
        made = await generate(*given, **named)
        if (span := span_of(labels, self._run)) is not None:
            for sequence in made[2]:
                setattr(sequence, _MADE_BY, span)
        return made

    async def _score_group(self, score: Callable[..., Awaitable[list[Any]]], group: Any) -> list[Any]:
        """The samples of a group, in the order of its conversations' sequences."""
        samples = await score(group)
        sequences = [sequence for each in group.completions_sequences for sequence in each]
        spans = [getattr(sequence, _MADE_BY, None) for sequence in sequences]
        if len(samples) == len(spans):  # a loop that leaves some out does not say which
            for sample, span in zip(samples, spans, strict=True):
                if span is not None:
                    sample.metrics |= {OLDEST: float(span[0]), NEWEST: float(span[1])}
        return samples

    def _watch(self, session: Any) -> None:
        """Have a session of aiohttp hand over the headers of its answers, which TRL does not keep."""
        import aiohttp

        if any(getattr(each, "deltawire", None) is self for each in session.trace_configs):
            return
        trace = aiohttp.TraceConfig()
        trace.deltawire = self  # type: ignore[attr-defined]
        trace.on_request_end.append(self._hear)
        trace.freeze()
        session.trace_configs.append(trace)

    async def _hear(self, session: Any, context: Any, ended: Any) -> None:
        if (headers := self._headers.get()) is not None:
            headers[:] = [ended.response.headers[name] for name in HEADERS if name in ended.response.headers]

    def _warn_of_silence(self, told: bool) -> None:
        if not told and not self._warned:
            self._warned = True
            logging.getLogger("deltawire").warning(
                "vLLM does not say which version made an answer, so %s is not logged: start it with --middleware "
                "deltawire.vllm.middleware.PolicyVersion, or use vLLM 0.33",
                LAG,
            )


def span_of(labels: Iterable[str], run: str) -> tuple[int, int] | None:
    """The oldest and the newest version of labels "RUN:VERSION"; None where one is not of `run`, or there is none."""
    parted = [label.rpartition(":") for label in labels]
    if not parted or any(of != run or not version.isdecimal() for of, _, version in parted):
        return None
    versions = [int(version) for _, _, version in parted]
    return min(versions), max(versions)


def _spans(choice: Any) -> Any:
    return choice.get("weight_versions") or ()
