"""A follower against a stand-in server: what the server serves, and a follower that runs on a thread."""

import threading

from small import SmallRun
from stub_engine import StubEngine
from waiting import PATIENCE

from deltawire.follow.follower import Follower
from deltawire.follow.status import audited
from deltawire.vllm.client import EngineClient


def served(engine: StubEngine) -> int | None:
    position = engine.worker.status().position
    return position and position.version


def assert_at_rest(engine: StubEngine, run: SmallRun, version: int, *, label: str | None = None) -> None:
    """Generating, no session open, and the weights and the label are those of a version."""
    assert (engine.paused, engine.session_open) == (False, False)
    assert served(engine) == version
    assert audited([engine.worker.live.audit(None)]).mismatched == []
    assert engine.weight_version == (label or f"{run.publisher.position.run}:{version}")


class Running:
    """A follower's `run` on a thread; what it reported, and what ended it."""

    def __init__(self, run: SmallRun, engine: StubEngine) -> None:
        self.updates, self.problems = threading.Semaphore(0), threading.Semaphore(0)
        self.told: list[Exception] = []
        self.ended_by: Exception | None = None
        self.follower = Follower(
            run.url,
            EngineClient(engine.url),
            poll=0.01,
            on_update=lambda report: self.updates.release(),
            on_problem=self._problem,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _problem(self, error: Exception) -> None:
        self.told.append(error)
        self.problems.release()

    def _run(self) -> None:
        try:
            self.follower.run()
        except Exception as error:
            self.ended_by = error

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *exc: object) -> None:
        self.follower.close()
        self.join()

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
