"""An engine in this process: the port of `follow.engine`, and nothing else of the package but what its docstring names.

It stands where an SGLang engine would: its workers hold LiveWorkers, reached by a function call instead of HTTP.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from deltawire.errors import EngineUnavailable
from deltawire.follow.engine import Engine, PauseMode
from deltawire.live.answers import Seat, respond
from deltawire.live.rpc import PREFIX
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.runlog.records import Position


class MemoryEngine(Engine):
    """One worker for each model. `fault` names a call that fails; with `late`, after it was done."""

    url = "an engine in memory"
    software = "the test"
    outlives_follower = False

    def __init__(self, *models: torch.nn.Module) -> None:
        self.workers = [LiveWorker(model, loading=AfterLoading(), workers=len(models)) for model in models]
        self.session_open = self.paused = False
        self.reported = "as started"
        self.calls: list[str] = []
        self.fault, self.late = "", False

    def call_workers(self, method: str, argument: str) -> Sequence[object]:
        verb = method.removeprefix(PREFIX)
        seats = [Seat(worker, rank, self.session_open) for rank, worker in enumerate(self.workers)]
        return [json.loads(json.dumps(respond(verb, argument, lambda seat=seat: seat))) for seat in seats]

    def close(self) -> None:
        """The engine goes on."""

    def begin_init(
        self, bucket: str, trusted: Iterable[str] = (), settings: Mapping[str, str] = {}, base: Path | None = None
    ) -> None:
        with self._called("begin_init"):
            for worker in self.workers:
                worker.begin_attach(self.attaching(bucket, trusted, settings, base))

    def start(self) -> None:
        with self._called("start"):
            self.session_open = True

    def update(self, bucket: str, target: Position) -> None:
        with self._called("update"):
            for worker in self.workers:
                worker.update(self.updating(bucket, target))

    def finish(self, weight_version: str | None) -> None:
        with self._called("finish"), ExitStack() as stack:
            for worker in self.workers:
                stack.enter_context(worker.recording("finish", clear=False))
                worker.confirm()
            self.session_open, self.reported = False, weight_version or self.reported

    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        with self._called("pause"):
            self.paused = True

    def resume(self) -> None:
        with self._called("resume"):
            self.paused = False

    def is_paused(self) -> bool:
        return self.paused

    def label(self, weight_version: str) -> None:
        with self._called("label"):
            self.reported = weight_version

    def weight_version(self) -> str:
        return self.reported

    @contextmanager
    def _called(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        if self.fault == name and not self.late:
            raise EngineUnavailable(f"{name} fails, before it is done")
        yield
        if self.fault == name:
            raise EngineUnavailable(f"{name} fails, after it was done")
