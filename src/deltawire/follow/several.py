"""Followers of several servers in one process, each on a thread of its own: what ends one holds up no other."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, Self, TypeVar

from deltawire.follow.loop import SAY_AGAIN, FollowLoop

F = TypeVar("F", bound=FollowLoop[Any])
T = TypeVar("T")


class Several(Generic[F]):
    """`followers`, which need nothing of each other: each has its own health, heartbeat and lease."""

    def __init__(self, followers: Sequence[F]) -> None:
        self.followers = tuple(followers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop `run`, wait for updates in progress, and close connections; the servers keep what they serve."""
        self.stop()
        for follower in self.followers:
            follower.close()

    def stop(self) -> None:
        """Have `run` return after the updates whose pause has begun; safe in a signal handler."""
        for follower in self.followers:
            follower.stop()

    def run(self) -> None:
        """Follow until stopped or closed. What ends a follower by itself is reported and tried again every minute,
        while the others go on: a person may have mended it."""
        threads = [
            threading.Thread(target=self._keep, args=(follower,), name=f"deltawire-{follower.replica}", daemon=True)
            for follower in self.followers
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # in short waits, which a signal may interrupt
                    thread.join(1.0)
        finally:
            self.stop()
            for thread in threads:
                thread.join()

    def step(self) -> list[Any]:
        """What `step` of each follower returns, all at the same time. Raises the first error, after all have ended."""
        done = at_once(self.followers, lambda follower: follower.step())
        require(done)
        return [done[follower] for follower in self.followers]

    def _keep(self, follower: F) -> None:
        while not follower.stopping.is_set():
            try:
                follower.run()
            except Exception as error:  # whatever it is, it is this server's alone
                with suppress(Exception):  # what cannot be told ends no follower, either
                    follower.report(error)
                follower.stopping.wait(SAY_AGAIN)


def at_once(followers: Sequence[F], do: Callable[[F], T]) -> dict[F, T | Exception]:
    """What a call for each follower returned or raised, each on a thread of its own."""

    def done(follower: F) -> T | Exception:
        try:
            return do(follower)
        except Exception as error:
            return error

    if not followers:
        return {}
    with ThreadPoolExecutor(len(followers)) as pool:
        try:
            return dict(zip(followers, pool.map(done, followers), strict=True))
        except BaseException:  # Ctrl-C: the pool waits for its threads, and theirs may be long waits
            for follower in followers:
                follower.stop()
            raise


def failed(done: Mapping[F, T | Exception]) -> dict[F, Exception]:
    """Those whose call raised, and what."""
    return {follower: found for follower, found in done.items() if isinstance(found, Exception)}


def require(done: Mapping[F, T | Exception]) -> None:
    """Raise the first error, if any."""
    for error in failed(done).values():
        raise error
