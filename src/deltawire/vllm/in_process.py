"""Follow a bucket with vLLM's offline `LLM` class, in the process that embeds it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltawire.errors import EngineError, EngineUnsupported
from deltawire.follow.engine import Engine, PauseMode
from deltawire.follow.follower import Follower
from deltawire.runlog.records import Position
from deltawire.vllm.hooks import NOT_CHOSEN


def follow(llm: Any, bucket: str, **options: Any) -> Follower:
    """See `deltawire.vllm.follow`."""
    return Follower(bucket, LocalEngine(llm), **options)


class LocalEngine(Engine):
    """The engine behind an `LLM`. It generates only inside `generate`, so there is nothing to pause."""

    url = "this process's LLM"
    software = "vLLM"
    outlives_follower = False

    def __init__(self, llm: Any) -> None:
        self._llm, self._label = llm, "default"

    def close(self) -> None:
        """Nothing to let go of: the LLM is its owner's."""

    def call_workers(self, method: str, argument: str) -> list[Any]:
        try:
            return list(self._llm.collective_rpc(method, args=(argument,)))
        except Exception as error:
            raise EngineUnsupported(f"{self.url} has no deltawire engine ({error}): {NOT_CHOSEN}") from None

    def begin_init(
        self, bucket: str, trusted: Iterable[str] = (), settings: Mapping[str, str] = {}, base: Path | None = None
    ) -> None:
        self._call("init_weight_transfer_engine", init_info=self.attaching(bucket, trusted, settings, base))

    def start(self) -> None:
        self._call("start_weight_update")

    def update(self, bucket: str, target: Position) -> None:
        self._call("update_weights", update_info=self.updating(bucket, target))

    def finish(self, weight_version: str | None) -> None:
        self._call("finish_weight_update")
        self._label = weight_version or self._label

    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        if clear_cache:
            self._llm.reset_prefix_cache()

    def resume(self) -> None:
        """Nothing was held."""

    def is_paused(self) -> bool:
        return False

    def label(self, weight_version: str) -> None:
        self._label = weight_version

    def weight_version(self) -> str:
        return self._label

    def _call(self, method: str, **arguments: Any) -> None:
        try:
            self._llm.collective_rpc(method, kwargs=arguments)
        except Exception as error:
            raise EngineError(f"{self.url}: {method} failed: {error}") from error
