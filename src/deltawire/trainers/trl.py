"""TRL's AsyncGRPOTrainer publishes its weights to a bucket, and waits until vLLM serves them. Two lines:

    transfer = DeltaWeightTransfer("hf://buckets/me/run", assets="path/to/model")
    trainer = AsyncGRPOTrainer(…, weight_transfer=transfer)

It speaks the WeightTransferProtocol of TRL 1.16 and needs nothing of TRL itself.
"""

import inspect
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

from deltawire.buckets import Bucket, open_bucket
from deltawire.publish.publisher import Publisher
from deltawire.publish.reports import PublishReport
from deltawire.runlog.records import Position
from deltawire.trainers.behind import log_into, trainer_behind
from deltawire.trainers.merging import warn_of_merging
from deltawire.trainers.policies import log_lag, record_policies
from deltawire.trainers.serving import ASK_ENGINE_EVERY, Look, engine_look, heartbeats_look, wait_until_served

ENGINE_SECONDS = 10.0
"""seconds one vLLM server may take to say what it serves before the next one is asked"""


class DeltaWeightTransfer:
    """Weight sync for TRL through a bucket that vLLM servers follow.

    `bucket` is a URL, made if it is not there, or an open Bucket. `publisher` are `dw.Publisher`'s options: `base`,
    `assets`, `signing_key`, `prepare`, `run` and so on. Nothing is opened before TRL begins to train, and then only by
    rank 0, so every rank may make the object.

    TRL tags each sample with its own counter, which moves when `send_weights` returns, and drops samples more than
    `max_staleness` behind. The tag is true with `wait_for="served"`: `send_weights` then returns once one replica
    serves the version just published, or a newer one. It knows by the heartbeats that followers write to the bucket or,
    given `engine_urls`, by what those vLLM servers say. On a store that bills or limits calls a heartbeat comes at most
    every 30 seconds: name the servers where steps are shorter. Servers that lag behind the first one may still answer
    with older weights.

    With wait_for="commit" `send_weights` returns once the version is durable, and training goes on while servers fetch
    it. A tag then says which version was committed when the sample was begun, not which one made it. A sample may be
    older than `max_staleness` by as many versions as its server lags; `deltawire follow --max-staleness` bounds that.

    `timeout` bounds, in seconds, one wait for commit and replica. Other ranks wait meanwhile, so keep it below their
    process group's timeout (ten minutes with NCCL). `poll` is seconds between looks.

    TRL merges a PEFT adapter into its base for every sync. In a bf16 base that loses bits for good; a warning says so
    once (`trainers.merging`).

    What each publish reports goes into the trainer's logs as `deltawire/…`. So does which versions made the samples,
    `deltawire/policy_oldest` and `policy_newest`, where vLLM tells, and `policy_lag`, how far behind the trained one
    they were (`trainers.policies`).

    No server is paused by it: each follower pauses its own server around the swap alone.
    """

    def __init__(
        self,
        bucket: str | Bucket,
        engine_urls: Iterable[str] | None = None,
        *,
        wait_for: Literal["served", "commit"] = "served",
        timeout: float = 300.0,
        poll: float | None = None,
        **publisher: Any,
    ) -> None:
        if wait_for not in ("served", "commit"):
            raise ValueError(f'wait_for={wait_for!r}: "served" or "commit"')
        if isinstance(engine_urls, str):
            raise TypeError("engine_urls: a list of addresses, ['http://127.0.0.1:8000'], and not one by itself")
        if poll is not None and poll < 0:
            raise ValueError(f"poll={poll!r}: seconds, at least 0")
        inspect.signature(Publisher).bind("bucket", **publisher)  # a misspelt option now, not when training begins
        if isinstance(bucket, str):
            open_bucket(bucket)  # and a misspelt address
        self._bucket, self._options = bucket, publisher
        self._engine_urls = tuple(engine_urls or ())
        self._wait_for, self._timeout, self._poll = wait_for, timeout, poll
        self._publisher: Publisher | None = None
        self._opened = ExitStack()
        self._look: Look | None = None
        self._warned = False
        self.last: PublishReport | None = None
        """what the last `send_weights` published"""
        self.policies: list[Position] = []
        """what each `send_weights` that returned made durable. A sample that TRL tags n was begun with entry n - 1,
        counted from the tag that training began with"""

    @property
    def position(self) -> Position | None:
        """The newest committed position; None before the first commit and after `destroy`."""
        return self._publisher.position if self._publisher else None

    def init_weight_transfer(self) -> None:
        """Open the bucket and continue its run, if it holds one.

        Raises BucketError, FormatError, ChainError; ImportError when `engine_urls` are given without httpx."""
        if self._publisher is not None:
            return
        with ExitStack() as opened:
            bucket = open_bucket(self._bucket, create=True) if isinstance(self._bucket, str) else self._bucket
            self._look = self._looker(bucket, opened)
            self._publisher = opened.enter_context(Publisher(bucket, **self._options))
            self._opened = opened.pop_all()

    def pause(self) -> None:
        """Nothing: a follower pauses its server when an update is ready to be written."""

    def send_weights(self, iterator: Iterator[tuple[str, Any]]) -> None:
        """Publish the weights as the next version, and wait as `wait_for` says.

        `iterator` yields (checkpoint name, full tensor) of what is trained. It is always consumed to its end, in order,
        since other ranks take part in making its tensors. The first call, TRL's cold sync, fixes the set of names. What
        TRL does not yield, frozen and tied weights, comes from `base`, or is the server's to derive.

        Raises what `Publisher.publish` and `flush` raise, and NotServed, saying what was seen, when no replica got
        there in time. What was captured is kept, and goes with the next call.
        """
        pairs = iter(iterator)
        trainer = trainer_behind(pairs)
        self._warned = self._warned or warn_of_merging(getattr(trainer, "model", None))
        if self.policies:
            log_lag(trainer, self.policies[-1].version)
        try:
            self.init_weight_transfer()
            assert self._publisher is not None
            self.last = self._publisher.publish(pairs)
            log_into(trainer, self.last.as_metrics())
            record_policies(trainer, self.last.run)
        finally:
            for _ in pairs:
                pass
        deadline = time.monotonic() + self._timeout
        committed = self._publisher.flush(self._timeout)
        if self._wait_for == "served":
            assert committed is not None and self._look is not None
            bucket = self._publisher.bucket
            wait_until_served(
                self._look,
                committed,
                timeout=max(0.0, deadline - time.monotonic()),
                poll=self._poll or (ASK_ENGINE_EVERY if self._engine_urls else bucket.poll_seconds),
                where=bucket.url,
            )
        if committed is not None:
            self.policies.append(committed)

    def resume(self) -> None:
        """Nothing: a follower has its server go on as soon as the update is written."""

    def destroy(self) -> None:
        """Commit what is not committed yet, and let go of the bucket; the next `send_weights` opens it again.

        TRL calls this however training ended. An error under way stays the one that its caller sees: what cannot be
        committed within seconds is then only noted on it."""
        self._publisher, self._look = None, None
        self._opened.__exit__(*sys.exc_info())

    def _looker(self, bucket: Bucket, opened: ExitStack) -> Look:
        if not self._engine_urls:
            return heartbeats_look(bucket)
        from deltawire.vllm.client import EngineClient

        engines = [opened.enter_context(EngineClient(url, timeout=ENGINE_SECONDS)) for url in self._engine_urls]
        return engine_look(engines)
