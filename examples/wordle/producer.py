"""A thread that plays the next rollout while the trainer learns from the one before: asynchrony with a bound.

A rollout is begun only when there is room for it, so that it is played with the newest weights vLLM has: with `depth`
rollouts at most waiting or being played, each was begun `depth` optimizer steps before the one it trains, and what it
is older than that is what vLLM lags behind the bucket.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from types import TracebackType

from examples.wordle.rollouts import Player, Rollout


class Producer:
    """Plays rollouts from the moment it is made until `close`, each with the next seeds.

    `make_player` is called on the thread, whose event loop owns the player's connections.
    """

    def __init__(self, make_player: Callable[[], Player], *, groups: int, depth: int = 1) -> None:
        self._make_player = make_player
        self._groups = groups
        self._rollouts: queue.SimpleQueue[Rollout | Exception] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closing = threading.Event()
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
            item = self._rollouts.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no rollout in {timeout:.0f} s") from None
        if isinstance(item, Exception):
            raise item
        self._room.release()
        return item

    def close(self) -> None:
        """Stop after the rollout being played."""
        self._closing.set()
        self._room.release()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        try:
            asyncio.run(self._play())
        except Exception as error:
            self._rollouts.put(error)

    async def _play(self) -> None:
        seed = 0
        async with self._make_player() as player:
            while await asyncio.to_thread(self._wait_for_room):  # on another thread: the sessions must answer pings
                self._rollouts.put(await player.play(seed))
                seed += self._groups

    def _wait_for_room(self) -> bool:
        self._room.acquire()
        return not self._closing.is_set()
