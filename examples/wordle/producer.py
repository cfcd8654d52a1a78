"""A thread that keeps a bounded queue of rollouts full, so that the trainer never waits for a game it could have had.

The bound keeps rollouts young: one waits to be put while `depth` wait to be taken, so a rollout was begun at most
`depth + 2` optimizer steps before the one it trains, plus what vLLM lags behind the bucket.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from examples.wordle.rollouts import Player, Rollout

POLL = 0.2
"""seconds between two looks at whether to stop"""


class Producer:
    """Plays rollouts from the moment it is made until `close`, each with the next seeds.

    `make_player` is called on the thread, whose event loop owns the player's connections.
    """

    def __init__(self, make_player: Callable[[], Player], *, groups: int, depth: int = 1) -> None:
        self._make_player = make_player
        self._groups = groups
        self._queue: queue.Queue[Rollout | BaseException] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Producer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, timeout: float) -> Rollout:
        """The oldest rollout. Raises what stopped the player, or TimeoutError after `timeout` seconds."""
        try:
            item = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no rollout in {timeout:.0f} s") from None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop after the rollout being played."""
        self._stopping.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        try:
            asyncio.run(self._play())
        except Exception as error:
            self._put(error)

    async def _play(self) -> None:
        seed = 0
        async with self._make_player() as player:
            while not self._stopping.is_set():
                await asyncio.to_thread(self._put, await player.play(seed))  # the sessions answer pings meanwhile
                seed += self._groups

    def _put(self, item: Rollout | BaseException) -> None:
        while not self._stopping.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=POLL)
                break
