"""A version goes live on all of several servers, or on none of them.

    stage everywhere → all have staged → pause and write everywhere → all have written → resume everywhere

Until the last step no server generates with the new weights. So a failure before it is taken back from memory, within
the pause. After it the way back is the one of a pin: the same delta, undone.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from deltawire.errors import EngineError, NotServed, error_text, some
from deltawire.follow.follower import Follower, UpdateReport, Written
from deltawire.follow.loop import SAY_AGAIN, FollowLoop, replica_name
from deltawire.follow.options import FollowOptions
from deltawire.follow.several import at_once, failed
from deltawire.read.seen import place_of
from deltawire.runlog.records import Position


class Broadcast(FollowLoop[list[UpdateReport]]):
    """Keeps the servers of `followers` at one version, the newest. Its `health` is of all of them as one: they serve a
    version when each of them does.

    A server that does not answer, or cannot stage a version, holds that version back from all: it is waited for, and
    the others go on with what they serve. A server that joins is brought to the version of the others by itself. A
    version that was taken back is tried again after a minute, or once there is a newer one.
    """

    def __init__(self, bucket_url: str, followers: Sequence[Follower], options: FollowOptions) -> None:
        self.followers = tuple(followers)
        name = replica_name(" ".join(follower.engine.url for follower in self.followers))
        super().__init__(bucket_url, options, server=name, state=place_of(options.state, name))
        self._taken_back: _TakenBack | None = None
        self._going_live = False

    def run(self) -> None:
        """See `FollowLoop.run`; whatever a server does is reported and waited for. The leases are renewed meanwhile."""
        with ExitStack() as stack:
            for follower in self.followers:
                stack.enter_context(follower.lease.renewed())
            super().run()

    def close(self) -> None:
        """See `FollowLoop.close`."""
        self.stop()
        super().close()

    def step(self) -> list[UpdateReport] | None:
        """See `FollowLoop.step`. Raises NotServed, naming the servers that held the version back or failed."""
        reports = super().step()
        if self.health.waiting is not None:
            for follower in self.followers:
                follower.health.waits(self.health.waiting)
        return reports

    def stop(self) -> None:
        """See `FollowLoop.stop`. A version that is about to go live is brought to its end first."""
        super().stop()
        if not self._going_live:
            self._stop_all()

    def beat(self, *, need: int | None = None, error: str | None = None) -> None:
        """Each server has a heartbeat of its own; all of them together have none."""
        for follower in self.followers:
            follower.beat(need=need, error=follower.health.problem or error)

    def report(self, error: Exception) -> None:
        """See `FollowLoop.report`. What is the bucket's stands in the way of every server."""
        if not isinstance(error, NotServed):
            for follower in self.followers:
                follower.health.fails(error)
        super().report(error)

    def _advance(self, target: Position) -> list[UpdateReport] | None:
        reports = self._bring(target)
        if reports is not None and not self._are_sound():
            reports += self._bring(target) or []
        return reports or None

    def _bring(self, target: Position) -> list[UpdateReport] | None:
        """Have all servers serve a version; None when we were stopped before. Raises NotServed."""
        if self._taken_back is not None and self._taken_back.stands(target, self.health.clock()):
            raise self._taken_back.why
        prepared = at_once(self.followers, lambda follower: _prepare(follower, target))
        if problems := failed(prepared):
            raise self._held_back(target, problems)
        reports = self._together(target, [follower for follower in self.followers if prepared[follower]])
        if reports is not None:
            self.health.is_current(target)
            for follower in self.followers:
                follower.health.problem = None
        return reports

    def _are_sound(self) -> bool:
        """Whether live memory is what it should be, of servers where it is time to look. What keeps one from looking
        is reported."""
        found = at_once(self.followers, lambda follower: follower.is_sound())
        for follower, error in failed(found).items():
            follower.report(error)
        return False not in found.values()

    def _together(self, target: Position, behind: Sequence[Follower]) -> list[UpdateReport] | None:
        """Have servers go live with what they have staged; None when we were stopped before they began."""
        self._going_live = True
        try:
            return None if self.stopping.is_set() else self._go_live(target, behind)
        finally:
            self._going_live = False
            if self.stopping.is_set():
                self._stop_all()

    def _go_live(self, target: Position, behind: Sequence[Follower]) -> list[UpdateReport]:
        """Write what these servers have staged, and let all of them go on with it, or none."""
        before = {follower: follower.health.served for follower in behind}
        try:
            written = at_once(behind, lambda follower: _write(follower, target))
        except BaseException:  # Ctrl-C: they have written by now, and are paused
            at_once(behind, lambda follower: follower.server.withdraw())
            raise
        if problems := failed(written):
            raise self._take_back(target, before, problems)
        whole: Mapping[Follower, Written] = {one: done for one, done in written.items() if isinstance(done, Written)}
        concluded = at_once(behind, lambda follower: follower.conclude(target, whole[follower]))
        late = failed(concluded)
        if lost := {one: error for one, error in late.items() if not _serves(one, target)}:
            raise self._take_back(target, before, lost)
        for follower in behind:
            follower.health.is_current(target)
            if follower in late:
                follower.report(late[follower])
        return [report for report in concluded.values() if isinstance(report, UpdateReport)]

    def _held_back(self, target: Position, problems: Mapping[Follower, Exception]) -> NotServed:
        """Why no server goes to a version: some could not stage it. The others go on with what they serve."""
        said = _said(problems)
        self._tell_each(problems, NotServed(f"version {target.version} waits for {said}"))
        return NotServed(f"version {target.version} is held back from all servers until each can stage it: {said}")

    def _take_back(
        self, target: Position, before: Mapping[Follower, Position | None], problems: Mapping[Follower, Exception]
    ) -> NotServed:
        """Bring servers back to what each served before a version, and say why; what cannot go back is named."""
        at_once([*before], lambda follower: follower.server.withdraw())  # what counts is what they serve then
        stuck = failed(at_once([*before], lambda follower: _bring_back(follower, before[follower], target)))
        text = f"version {target.version} was taken back from all servers: {_said(problems)}"
        if stuck:
            text += f"; it may still be served by {_said(stuck)}"
        self._taken_back = _TakenBack(target, self.health.clock() + SAY_AGAIN, NotServed(text))
        self._tell_each({**problems, **stuck}, self._taken_back.why)
        return self._taken_back.why

    def _tell_each(self, problems: Mapping[Follower, Exception], others_hear: NotServed) -> None:
        """Report what a server did, and have the others know why they go on with what they serve. Where that is one
        version, it is what they should serve for now."""
        others = [follower for follower in self.followers if follower not in problems]
        for follower, error in problems.items():
            follower.report(error)
        for follower in others:
            follower.health.fails(others_hear)
            if len({other.health.served for other in others}) == 1:
                follower.health.holds()

    def _stop_all(self) -> None:
        for follower in self.followers:
            follower.stop()

    def _ask_server(self) -> Position | None:
        for follower in self.followers:
            follower.listen()
        served = {follower.health.served for follower in self.followers}
        return served.pop() if len(served) == 1 else None

    def _let_go_of_server(self) -> None:
        for follower in self.followers:
            follower.close()


@dataclass(frozen=True, slots=True)
class _TakenBack:
    """A version that was taken back, and why; it is not tried again before `until`, in seconds of the health's
    clock."""

    target: Position
    until: float
    why: NotServed

    def stands(self, target: Position, now: float) -> bool:
        """Whether a version should not be tried now."""
        return target == self.target and now < self.until


def _prepare(follower: Follower, target: Position) -> bool:
    """Have a server stage a version, by its own reading of the bucket. Whether there is something to write."""
    own = follower.source.target(target.version)
    if own != target:
        raise NotServed(f"the bucket moved on meanwhile: version {target.version} was {target.root[:12]}…")
    follower.health.bucket_says(target.version)
    return follower.prepare(target)


def _write(follower: Follower, target: Position) -> Written:
    """Pause a server and write what it staged. Raises what its workers recorded."""
    written = follower.write(target)
    follower.server.require(written.status)
    if written.status.position != target:
        raise EngineError(f"{follower.engine.url} took {target} without an error and does not serve it")
    return written


def _serves(follower: Follower, target: Position) -> bool:
    """Whether a server whose last call failed serves the version all the same; the next step then names it."""
    with suppress(EngineError):
        status = follower.server.take()
        return status is not None and status.position == target
    return False


def _bring_back(follower: Follower, before: Position | None, target: Position) -> None:
    """Have a server serve what it served before a version, if it serves that. Raises what keeps it from it."""
    status = follower.server.take()
    if status is not None:
        follower.health.server_says(status.position)
    if follower.health.served != target:
        return
    if before is None:
        raise NotServed("it was at no version before")
    if follower.prepare(before):
        follower.commit(before)
    follower.health.server_says(before)


def _said(problems: Mapping[Follower, Exception]) -> str:
    """Which servers have which problem."""
    return some(f"{follower.engine.url}: {error_text(error)}" for follower, error in problems.items())
