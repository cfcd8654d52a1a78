"""The port of an inference engine: what a server must offer so that a follower can drive it.

To add an engine, write two things beside `vllm/`, and change nothing here or in `live/`:

1. In each worker process, a `live.worker.LiveWorker` over the loaded model, made when the model is. Beside it, a method
   for each verb of `live.rpc.VERBS`, named `deltawire_` and the verb. It takes one string and returns
   `live.answers.respond(verb, string, find)`. `live.live_weights.watch_loading` wraps what the engine does to weights
   after loading them. The engine's own calls for a weight update reach `LiveWorker.begin_attach`, `update` and
   `confirm`, on the thread that runs forward passes, between two of them.
2. In the follower's process, a subclass of `Engine` that implements the abstract methods below. The follower does the
   rest. A command may offer it as `Follower(url, MyEngine(address))`.

Every docstring says in which state a failure leaves the server. After any failure the follower asks for the status,
closes a session that is open and resumes; the next step looks again. So a call may fail after it was done.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from deltawire.follow.status import ServerStatus
from deltawire.follow.workers import WorkerCalls
from deltawire.live.messages import Attach, Update
from deltawire.runlog.records import Position

PauseMode = Literal["keep", "wait", "abort"]
"""what becomes of requests in flight: kept where they are, finished first, or ended"""


class Engine(WorkerCalls):
    """One engine and all its workers.

    Every call raises EngineUnavailable when nobody answers, BadAnswer when what comes back is no answer to it, and
    EngineError when it refuses. EngineUnsupported says what the engine lacks.
    """

    outlives_follower: bool = True
    """whether it is still there when the process of its follower has ended; what it saw is then remembered in a file"""

    @abstractmethod
    def close(self) -> None:
        """Let go of it; it goes on as it is, a pause or an open session too. Raises nothing; a second call does
        nothing."""

    @abstractmethod
    def begin_init(
        self, bucket: str, trusted: Iterable[str] = (), settings: Mapping[str, str] = {}, base: Path | None = None
    ) -> None:
        """Have every worker's `begin_attach` called with what `attaching` makes of this. They attach in the background:
        placement is probed and live weights digested. The outcome is in `status`, once nothing is being done.

        A failure leaves the weights, and what is attached, as they were; some workers may be attaching.
        """

    @abstractmethod
    def start(self) -> None:
        """Open a weight update session; `status` says `session_open` from now on. The server goes on generating.

        A session that is open already is an outcome in `status`, and no error. A failure leaves the server generating
        the old version, with or without a session.
        """

    @abstractmethod
    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        """Hold generation: no forward pass runs after it has returned. `clear_cache` drops KV of older weights.

        A failure leaves the server generating the old version, or paused; requests may have been ended ("abort").
        """

    @abstractmethod
    def update(self, bucket: str, target: Position) -> None:
        """Have every worker's `update` called with what `updating` makes of this: each writes what it has staged.

        That it returns says nothing: read `status`. A worker that fails keeps or restores its old weights, or says that
        it is quarantined. Workers may be at different versions after it (`torn`); the follower then reverts.
        """

    @abstractmethod
    def finish(self, weight_version: str | None) -> None:
        """Close the session, and have every worker's `confirm` called; with a version the engine reports it from now
        on.

        A failure leaves the new weights in place, with or without a session, under the old name or the new.
        """

    @abstractmethod
    def resume(self) -> None:
        """Let generation go on; nothing to do where it is not held. A failure leaves it held, or going on."""

    @abstractmethod
    def is_paused(self) -> bool:
        """Whether generation is held. Changes nothing."""

    @abstractmethod
    def label(self, weight_version: str) -> None:
        """Have the engine report this version from now on; no weight moves. A failure leaves the old name or the
        new."""

    @abstractmethod
    def weight_version(self) -> str:
        """The version that the engine reports. Changes nothing."""

    def init(self, bucket: str, trusted: Iterable[str] = ()) -> ServerStatus:
        """Attach the workers to a bucket, and wait for it however long it takes. Its outcome is the status."""
        self.begin_init(bucket, trusted)
        while (status := self.status()).staging:
            self.rest(status.doing_s)
        return status

    def attaching(
        self, bucket: str, trusted: Iterable[str], settings: Mapping[str, str], base: Path | None
    ) -> dict[str, object]:
        """What `LiveWorker.begin_attach` takes, as JSON will carry it."""
        at = None if base is None else str(base)
        asked: dict[str, object] = msgspec.to_builtins(
            Attach(bucket, tuple(sorted(trusted)), dict(settings), at, lease=self.token)
        )
        return asked

    def updating(self, bucket: str, target: Position) -> dict[str, object]:
        """What `LiveWorker.update` takes, as JSON will carry it."""
        asked: dict[str, object] = msgspec.to_builtins(Update(bucket, target.version, target.root, lease=self.token))
        return asked
