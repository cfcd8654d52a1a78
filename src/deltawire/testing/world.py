"""One bucket and all who use it, each step of theirs a call: what a state machine and a simulation choose from.

A trainer captures and uploads, a compactor folds and anchors, a pruner deletes, followers read. The world remembers the
bits of every captured version. Nothing that a follower holds may be anything else, and no acknowledged version is lost.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from deltawire.buckets.base import Bucket
from deltawire.errors import ChainError, FormatError, NotFound, OtherRun
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.keys import RUNS, run_of
from deltawire.runlog.records import Position
from deltawire.testing.actors import Follower, Trainer
from deltawire.testing.model import TABLE, Weights, copied
from deltawire.testing.witnessed import Broken, Witnessed, hold, problems_of
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.retention import Policy
from deltawire.weights.digest import digest
from deltawire.weights.digest import root as root_of
from deltawire.weights.tensors import equal


class World:
    """A bucket and those who use it. `through` gives each of them, by name, its own way to the store. `codec` is that
    which its trainer publishes in."""

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        *,
        draw: Random,
        clock: Callable[[], float],
        through: Callable[[str, Bucket], Bucket] = lambda name, bucket: bucket,
        followers: int = 2,
        codec: str = "gap",
    ) -> None:
        self.bucket, self.draw, self.clock, self.folder, self.codec = Witnessed(bucket), draw, clock, folder, codec
        self._right: dict[str, Weights] = {}
        self.acknowledged: Position | None = None
        self._ways = {name: through(name, self.bucket) for name in ("trainer", "compactor", "pruner")}
        self.trainer = Trainer(self, self._ways["trainer"])
        self._compactor: Compactor | None = None
        names = [f"follower-{number}" for number in range(followers)]
        self.followers = [Follower(self, through(name, self.bucket), name) for name in names]

    def new_run_id(self) -> str:
        """An id by the seed."""
        return f"{self.draw.getrandbits(64):016x}"

    # Upkeep

    def compact(self, levels: tuple[int, ...] = (2, 4, 8), anchors: int = 4) -> None:
        """Write the folds and anchors that are due. A compactor whose run was superseded is replaced by one that opens
        the new run."""
        if self._compactor is None:
            self._compactor = Compactor(self._ways["compactor"], self.folder / "mirror", levels=levels, anchors=anchors)
        try:
            self._compactor.step()
        except OtherRun:
            self.stop_compactor()
            raise

    def stop_compactor(self) -> None:
        """It ends; its mirror stays on the disk."""
        if self._compactor is not None:
            self._compactor.close()
            self._compactor = None

    def prune(self, policy: Policy | None = None) -> None:
        """Delete what nobody needs. Who said lately where it stands can still go on from there by deltas."""
        bucket, chosen = self._ways["pruner"], policy or Policy(1, -1.0)
        active = [follower for follower in self.followers if self._is_active(follower, chosen)]
        stood = {follower.said for follower in active if self._leads_on(follower.said)}
        with Subscriber(bucket) as subscriber:
            run = subscriber.run.run
        retention.carry_out(bucket, retention.find_prunable(bucket, run, chosen, clock=self.clock))
        for follower in self.followers:
            if self._is_active(follower, chosen) and follower.said in stood and not self._leads_on(follower.said):
                raise Broken(f"{follower.name} said that it stands on {follower.said}, and that was pruned")

    def _is_active(self, follower: Follower, policy: Policy) -> bool:
        """Whether a follower said lately where it stands, with time to spare for the prune."""
        return self.clock() - follower.said_at < 1800 * policy.replica_hours

    def _leads_on(self, position: Position | None) -> bool:
        """Whether deltas lead on from a position, or its run was superseded."""
        with Subscriber(self.bucket.inside) as subscriber, suppress(NotFound, ChainError):
            if position is not None and subscriber.run.run == position.run:
                weights = self._right[position.root]
                subscriber.change(position, subscriber.latest().version, weights=weights, anchors=False)
            return position is not None
        return False

    # What must hold

    def remember(self, weights: Weights) -> None:
        """Keep the bits of a version, from which nothing that is read under its root may differ."""
        held = copied(weights)
        self._right[root_of(TABLE, digest(held))] = held

    def require_right(self, position: Position, weights: Weights) -> None:
        """Raise Broken unless these are the weights that were captured as this version."""
        if position.root not in self._right:
            raise Broken(f"{position} was read, and no such weights were ever captured")
        if not equal(weights, self._right[position.root]):
            raise Broken(f"{position} was read with other bits than were captured")

    def check(self) -> None:
        """Raise Broken unless every invariant holds of the bucket and of the trainer, whatever went wrong before."""
        inside = self.bucket.inside
        hold(self.bucket.problem)
        if self.trainer.publisher is not None:
            at = self.trainer.publisher.position
            hold(self.trainer.publisher.problem(None if at is None else self._right.get(at.root)))
        for run in sorted({run for stat in inside.list(RUNS) if (run := run_of(stat.key)) is not None}):
            hold(*problems_of(inside, run))
        if self.acknowledged is not None:
            self._require_kept(self.acknowledged, inside)

    def _require_kept(self, position: Position, inside: Bucket) -> None:
        try:
            with Subscriber(inside) as subscriber:
                newest = subscriber.latest()
                if newest.run == position.run and newest.version < position.version:
                    raise Broken(f"{position} was acknowledged, and a reader finds {newest}")
                if newest.run != position.run and not log.continues(inside, newest.run, position.run):
                    raise Broken(f"{position} was acknowledged, and a reader finds {newest} of another run")
        except (NotFound, ChainError, FormatError) as error:
            raise Broken(f"{position} was acknowledged, and a reader finds {error!r}") from error

    def settle(self) -> None:
        """All goes well again: everyone takes up work where it was left, and everyone arrives."""
        self.trainer.start()
        self.trainer.flush()
        with suppress(NotFound, ChainError):  # what a compactor remembers may be pruned: it looks again next time
            self.compact()
        self.compact()
        for follower in self.followers:
            follower.follow()
            if not equal(follower.weights, self.trainer.weights):
                raise Broken(f"{follower.name} follows, and does not hold the trainer's weights")
        self.check()

    def close(self) -> None:
        """Let go of everything."""
        self.trainer.kill()
        self.stop_compactor()
