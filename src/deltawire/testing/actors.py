"""A trainer and a follower of a simulated world, each step of theirs a call. Nothing happens between two calls."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Protocol

from deltawire.buckets.base import Bucket
from deltawire.errors import AlreadyExists, ApplyError, FormatError, Gap, OtherRun
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.changes import Change
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.records import Position
from deltawire.testing.model import SHAPES, TABLE, Weights, copied, edit, first_weights
from deltawire.testing.stepped import SteppedPublisher
from deltawire.upkeep.materialize import materialize
from deltawire.weights.bits import Bits
from deltawire.weights.digest import digest
from deltawire.weights.digest import root as root_of


class BrokenOff(Exception):
    """What a trainer raises in the middle of a capture."""


class Surroundings(Protocol):
    """What a trainer and a follower need of their world."""

    draw: Random
    clock: Callable[[], float]
    folder: Path
    codec: str
    acknowledged: Position | None

    def new_run_id(self) -> str: ...
    def remember(self, weights: Weights) -> None: ...
    def require_right(self, position: Position, weights: Weights) -> None: ...


class Trainer:
    """Holds weights, captures and uploads them, is killed and started again."""

    def __init__(self, world: Surroundings, bucket: Bucket) -> None:
        self._world, self.bucket = world, bucket
        self.weights = first_weights(world.draw)
        self.publisher: SteppedPublisher | None = None

    def start(self, *, supersede: bool = False) -> None:
        """Open a publisher, unless one is open."""
        if self.publisher is None:
            world = self._world
            self.publisher = SteppedPublisher(
                self.bucket, clock=world.clock, new_run_id=world.new_run_id, supersede=supersede, codec=world.codec
            )

    def publish(self) -> None:
        """Train a step and capture it."""
        edit(self.weights, self._world.draw)
        self._capture(self.weights.items())
        self._world.remember(self.weights)

    def break_off(self) -> None:
        """Train a step, of which the capture fails between two tensors."""
        edit(self.weights, self._world.draw)
        first, *_ = self.weights.items()
        self._world.remember(self.weights)

        def pairs() -> Iterator[tuple[str, Bits]]:
            yield first
            raise BrokenOff("the trainer's own trouble")

        with suppress(BrokenOff):
            self._capture(pairs())

    def _capture(self, pairs: Iterable[tuple[str, Bits]]) -> None:
        self.start()
        assert self.publisher is not None
        self.publisher.publish(pairs)

    def upload(self) -> None:
        """One try at what waits."""
        if self.publisher is not None and self.publisher.upload():
            assert self.publisher.position is not None
            self._world.acknowledged = self.publisher.position

    def flush(self) -> None:
        """Capture, and upload all that waits."""
        self.publish()
        assert self.publisher is not None
        while self.publisher.upload():
            assert self.publisher.position is not None
            self._world.acknowledged = self.publisher.position

    def kill(self) -> None:
        """What was captured and not uploaded is gone with the process; the weights come back from its checkpoint."""
        if self.publisher is not None:
            self.publisher.kill()
            self.publisher = None


class Follower:
    """Keeps a copy of the weights, as a server does, and says so in a heartbeat."""

    def __init__(self, world: Surroundings, bucket: Bucket, name: str) -> None:
        self._world, self.bucket, self.name = world, bucket, name
        self.position: Position | None = None
        self.weights: Weights = {}
        self.said: Position | None = None
        """where its heartbeat says that it stands, and since when"""
        self.said_at = 0.0

    def follow(self) -> None:
        """Move to the newest version."""
        with Subscriber(self.bucket) as subscriber:
            self._move(subscriber, subscriber.latest())

    def pin(self) -> None:
        """Move to any version that is kept, older ones too."""
        with Subscriber(self.bucket) as subscriber:
            version = self._world.draw.choice(subscriber.chain.versions())
            self._move(subscriber, subscriber.position_at(version))

    def materialize(self) -> None:
        """Any kept version as a checkpoint folder, which is moved from the one it held."""
        with Subscriber(self.bucket) as subscriber:
            target = subscriber.position_at(self._world.draw.choice(subscriber.chain.versions()))
        out = self._world.folder / f"{self.name}-{target.run}"
        try:
            report = materialize(self.bucket, out, target.version)
        except AlreadyExists:  # all that leads away from the version it holds is pruned
            shutil.rmtree(out)
            report = materialize(self.bucket, out, target.version)
        weights = Checkpoint(out)
        self._world.require_right(report.position, {name: weights[name] for name in SHAPES})

    def _move(self, subscriber: Subscriber, target: Position) -> None:
        here = self.position if self.position is not None and self.position.run == target.run else None
        while True:
            change, held = self._changed(subscriber, here, target)
            if held is not None:
                break
            if not subscriber.pass_over(change):
                raise FormatError(f"{self.name}: nothing leads to {target}")
        self._world.require_right(target, held)
        self.position, self.weights = target, held
        self.said, now = None, self._world.clock()
        heartbeats.beat(self.bucket, Heartbeat(self.name, target.run, target.version, target.root, at=now))
        self.said, self.said_at = target, now

    def _changed(
        self, subscriber: Subscriber, here: Position | None, target: Position
    ) -> tuple[Change, Weights | None]:
        """A change, and the weights after it; None where they are not the target's."""
        try:
            change = subscriber.change(here, target.version, weights=self.weights)
        except (Gap, OtherRun):
            change = subscriber.change(None, target.version)
        start = self.weights if change.anchor is None else {name: change.anchor[name] for name in SHAPES}
        try:
            held = copied(dict(start)) + change.delta
        except (FormatError, ApplyError):
            return change, None
        return change, held if root_of(TABLE, digest(held)) == target.root else None
