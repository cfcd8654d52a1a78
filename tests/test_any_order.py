"""Everything in any order: publish, restart, supersede, compact, prune, catch up, roll back, materialize."""

import random
import shutil

import pytest
from runs import PATIENCE, edit, fresh, model, served

from deltawire import Publisher, Subscriber, materialize
from deltawire.errors import AlreadyExists
from deltawire.format.checkpoint import Checkpoint
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import equal


class World:
    """A bucket, its trainer, and what every committed version of every run must be."""

    def __init__(self, seed, folder, bucket=None):
        self.draw, self.folder = random.Random(seed), folder
        self.bucket, self.weights, self.right = bucket or fresh(), model(), {}
        self.publisher = Publisher(self.bucket)
        self.publish()

    def publish(self):
        for _ in range(self.draw.randrange(1, 4)):
            edit(self.weights, self.draw.randrange(10**6), share=0.03)
            self.publisher.publish(self.weights)
        self.publisher.flush(PATIENCE)
        self.right[self.publisher.position] = served(self.weights)

    def restart(self):
        self.publisher.close(PATIENCE)
        self.publisher = Publisher(self.bucket, run=self.draw.choice(["continue", "continue", "supersede"]))
        self.publish()

    def compact(self):
        cadence = self.draw.choice([2, 5, "adaptive", "never"])
        with Compactor(self.bucket, self.folder / "mirror", anchors=cadence) as compactor:
            compactor.step()

    def prune(self):
        with Subscriber(self.bucket) as subscriber:
            run = subscriber.run.run
        policy = retention.Policy(self.draw.randrange(1, 3), -1.0)
        retention.carry_out(self.bucket, retention.find_prunable(self.bucket, run, policy))

    def read(self):
        with Subscriber(self.bucket) as subscriber:
            known = [filed.record.position for filed in map(subscriber.chain.commit, subscriber.chain.versions())]
            kept = [position for position in known if position in self.right]
            here, there = self.draw.choice(kept), self.draw.choice(kept)
            change = subscriber.change(here, there.version)
            held = self.right[here] if change.anchor is None else {name: change.anchor[name] for name in self.weights}
            held = {name: bits.copy() for name, bits in held.items()} + change.delta
            assert equal(held, self.right[there])
            out = self.folder / f"out-{there.run}"
            self.materialize(out, there.version)
            assert equal({name: Checkpoint(out)[name] for name in self.weights}, self.right[there])

    def materialize(self, out, version):
        try:
            materialize(self.bucket, out, version)
        except AlreadyExists:  # all that leads away from the version it holds is pruned
            shutil.rmtree(out)
            materialize(self.bucket, out, version)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_comes_first_every_reader_gets_what_was_captured(tmp_path, seed):
    world = World(seed, tmp_path)
    try:
        for _ in range(20):
            world.draw.choice([world.publish, world.publish, world.restart, world.compact, world.prune, world.read])()
        world.read()
    finally:
        world.publisher.close(PATIENCE)
