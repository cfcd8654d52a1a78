"""Follow a bucket and drive a vLLM server through each new version: stage while it generates, pause, commit, resume.

The engine, not this process's memory, says where the server stands; so a follower may die and start again at any time.
"""

import threading
import time
from collections.abc import Callable

import msgspec

from deltawire.buckets import open_bucket
from deltawire.errors import (
    BucketError,
    EngineUnavailable,
    FormatError,
    NotFound,
    Quarantined,
)
from deltawire.manifests import Position
from deltawire.subscriber import Subscriber
from deltawire.vllm.client import EngineClient, WorkerStatus, named_error

ASK_AGAIN = 0.02
"""seconds between looks at a worker that is staging"""


class UpdateReport(msgspec.Struct, frozen=True):
    """One update that the server serves now.

    `from_version` is None when it started from an anchor. `pause_ms` is measured here, from asking for the pause to the
    answer to the resume; `write_ms` by the worker, around the writes alone. `verified` means that every changed
    tensor's new digest was equal to the commit's before anything was written. `publish_to_served_s` compares this
    host's clock with the publisher's.
    """

    run: str
    version: int
    from_version: int | None
    changed: int
    wire_bytes: int
    fetch_s: float
    stage_s: float
    pause_ms: float
    write_ms: float
    verified: bool
    publish_to_served_s: float


class Follower:
    """Keeps one vLLM server at the newest version of one bucket.

    `poll` is seconds between looks at the bucket, by default what suits the store. `clear_cache` chooses what happens
    to KV computed with older weights: True (default) drops the prefix cache and recomputes running requests, so that no
    token is sampled from mixed versions; False keeps both and pauses shorter.
    """

    def __init__(
        self,
        bucket_url: str,
        engine_url: str,
        *,
        poll: float | None = None,
        clear_cache: bool = True,
        on_update: Callable[[UpdateReport], None] = lambda report: None,
        on_problem: Callable[[Exception], None] = lambda error: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bucket = open_bucket(bucket_url)
        self._poll = poll if poll is not None else self.bucket.poll_seconds
        self._url, self._clear_cache, self._clock = bucket_url, clear_cache, clock
        self._on_update, self._on_problem = on_update, on_problem
        self._subscriber = Subscriber(self.bucket)
        self._engine = EngineClient(engine_url)
        self._stopping = threading.Event()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop `run` and close connections; the server keeps what it serves."""
        self._stopping.set()
        self._engine.close()
        self._subscriber.close()

    def run(self) -> None:
        """Follow until closed. What passes (a store or server out of reach, a damaged file) is reported and retried;
        raises what a person must mend: EngineUnsupported, Quarantined, ApplyError, OtherRun."""
        last: str | None = None
        while not self._stopping.is_set():
            try:
                self.step()
                last = None
            except (BucketError, FormatError, EngineUnavailable) as error:
                if last != str(error):
                    self._on_problem(error)
                last = str(error)
            self._stopping.wait(self._poll)

    def step(self) -> UpdateReport | None:
        """Bring the server to the newest version, once. None when there was nothing to do, or nothing is published.

        Raises BucketError, FormatError, ChainError, ApplyError, EngineError; the server then serves what it served.
        """
        try:
            target = self._subscriber.latest()
        except NotFound:
            return None
        status = self._engine.status()
        if status.attached != self.bucket.url:
            status = self._engine.init(self._url)
            self._require(status)
        if status.quarantined:
            raise Quarantined(f"{self._engine.url} cannot say what it serves: restart it")
        if status.position == target:
            self._label(status)
            return None
        self._stage(target)
        return self._commit(target)

    def _stage(self, target: Position) -> None:
        """Have the worker prepare the update while the server generates."""
        self._engine.stage(self._url, target.version)
        while (status := self._engine.status()).staging and not self._stopping.is_set():
            self._stopping.wait(ASK_AGAIN)
        self._require(status)

    def _commit(self, target: Position) -> UpdateReport | None:
        """Swap the weights inside a pause that only scatters. Generation is resumed whatever happens."""
        self._engine.start()
        paused = time.perf_counter()
        try:
            self._engine.pause(clear_cache=self._clear_cache)
            self._engine.update(self._url, target.version)
            status = self._engine.status()
            served = status.position == target
            self._engine.finish(str(target) if served else None)
        finally:
            self._engine.resume()
        pause_ms = 1e3 * (time.perf_counter() - paused)
        self._require(status)
        if not served or status.applied is None:
            raise Quarantined(f"{self._engine.url} took {target} without an error and does not serve it: restart it")
        report = UpdateReport(
            run=target.run,
            version=target.version,
            from_version=status.applied["from_version"],
            changed=status.applied["changed"],
            wire_bytes=status.applied["wire_bytes"],
            fetch_s=status.applied["fetch_s"],
            stage_s=status.applied["stage_s"],
            pause_ms=pause_ms,
            write_ms=status.applied["write_ms"],
            verified=True,
            publish_to_served_s=self._clock() - status.applied["created"],
        )
        self._on_update(report)
        return report

    def _label(self, status: WorkerStatus) -> None:
        """A server that stands on a version without saying so (fresh from that very checkpoint) is told its name."""
        if status.applied is None and self._engine.weight_version() != str(status.position):
            self._engine.start()
            self._engine.finish(str(status.position))

    def _require(self, status: WorkerStatus) -> None:
        if status.error is not None:
            raise named_error(status.error)
