"""Workers that hold parts of tensors as vLLM's do: each reads deltas of codec `class` from its own part alone."""

from contextlib import ExitStack

import pytest
import torch
from class_runs import deltas
from runs import PATIENCE, fresh
from sliced import MLP, SHAPES, Worker
from stub_engine import StubEngine

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.format import delta_file
from deltawire.format.codecs import subset, tiles
from deltawire.prepare.names import NameMap, View
from deltawire.vllm.client import EngineClient


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 2^11 elements and more, where there are of 2^18."""
    monkeypatch.setattr(tiles, "LEAST", 1 << 11)
    monkeypatch.setattr(tiles, "TARGET", 1 << 13)


class Trainer:
    """Trains on, and opens a publisher that has seen what the replicas say by now for each version."""

    def __init__(self, shapes=SHAPES, **options):
        self.bucket, self._options = fresh(), {"codec": "class", **options}
        self._random = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=self._random) for name, shape in shapes.items()}

    def publish(self):
        """One version more; the encoding of each tensor in its file."""
        with dw.Publisher(self.bucket, **self._options) as publisher:
            publisher.publish(self.weights)
            version = publisher.flush(PATIENCE).version
        for tensor in self.weights.values():
            where = torch.rand(tensor.shape, generator=self._random) < 0.02
            tensor[where] *= 1.01
        if version == 0:
            return {}
        header = delta_file.read_header(deltas(self.bucket)[version])
        return {spec.name: how for spec, how in zip(header.tensors, header.encodings, strict=True)}


class Fleet:
    """Servers of so many workers each, which follow a trainer's run."""

    def __init__(self, bucket, *sizes, dtype=torch.bfloat16):
        with ExitStack() as stack:
            self.engines = [
                stack.enter_context(StubEngine(*(Worker(rank, size, dtype) for rank in range(size)))) for size in sizes
            ]
            self.followers = [
                stack.enter_context(Follower(bucket.url, EngineClient(engine.url), replica=f"r{number}"))
                for number, engine in enumerate(self.engines)
            ]
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def step(self, *, start):
        """Every server comes to the newest version, from `start`, holds what was published, and says what it reads."""
        for follower in self.followers:
            report = follower.step()
            assert report.from_version == start
            audited = follower.audit()
            assert (audited.mismatched, audited.position.version) == ([], report.version)
            follower.beats.write(audited.position)


CASES = [((2,), torch.bfloat16), ((2, 4, 1), torch.bfloat16), ((4,), torch.float32)]


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=["two", "two, four and one", "four, in fp32"])
def test_workers_read_class_each_from_its_own_part(sizes, dtype, monkeypatch):
    trainer, decoded, done = Trainer(), [], subset.decode_tile
    trainer.publish()
    with Fleet(trainer.bucket, *sizes, dtype=dtype) as fleet:
        fleet.step(start=None)
        for follower, size in zip(fleet.followers, sizes, strict=True):
            assert ("class" in follower.beats.codecs) == (size == 1)  # what an older publisher asks
        assert trainer.publish() == dict.fromkeys(SHAPES, "class")
        monkeypatch.setattr(subset, "decode_tile", lambda job, twin: decoded.append(job) or done(job, twin))
        fleet.step(start=0)
        of_one = [job.tile for job in decoded if job.spec.name == f"{MLP}down_proj.weight"]
        assert {tile.width for tile in of_one} == {256 // max(sizes)}
        assert len(of_one) == len(sizes) * len({*of_one})  # no worker decodes another's part


def test_a_tensor_whose_tiles_cannot_suit_all_is_of_subset_and_the_others_are_of_class(monkeypatch):
    trainer = Trainer()
    trainer.publish()
    with Fleet(trainer.bucket, 2, 4) as fleet:
        fleet.step(start=None)
        monkeypatch.setattr(tiles, "LEAST", 1 << 13)
        written = trainer.publish()
        fleet.step(start=0)
    small = {name for name in SHAPES if "self_attn.k" in name or "self_attn.v" in name or "gate_up_proj" in name}
    assert {name for name, how in written.items() if how == "subset"} == small


def test_experts_that_a_trainer_holds_in_one_tensor_are_cut_as_the_checkpoint_has_them():
    names = {f"{MLP}experts.{number}.down_proj.weight" for number in range(4)}
    shapes = {name: shape for name, shape in SHAPES.items() if name not in names} | {"experts": (4, 128, 64)}
    views = tuple(
        View(f"{MLP}experts.{at}.down_proj.weight", ((at, at + 1), (0, 128), (0, 64)), (2, 1)) for at in range(4)
    )
    names = NameMap({name: (View(name),) if name != "experts" else views for name in shapes})
    trainer = Trainer(shapes, prepare=[names])
    trainer.publish()
    with Fleet(trainer.bucket, 2) as fleet:
        fleet.step(start=None)
        for version in range(1, 3):
            assert trainer.publish() == dict.fromkeys(SHAPES, "class")
            fleet.step(start=version - 1)
