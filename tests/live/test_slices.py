"""Workers that hold parts of tensors as vLLM's do: each reads deltas of codec `class` from its own part alone."""

from contextlib import ExitStack

import pytest
import torch
from class_runs import deltas
from runs import PATIENCE, fresh
from stub_engine import StubEngine
from torch import nn

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.format import delta_file
from deltawire.format.codecs import subset, tiles
from deltawire.prepare.names import NameMap, View
from deltawire.vllm.client import EngineClient

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
SHAPES = {
    "model.embed_tokens.weight": (250, 128),  # padded to 256 rows by the server
    f"{ATTENTION}q_proj.weight": (256, 128),
    f"{ATTENTION}k_proj.weight": (64, 128),  # two heads
    f"{ATTENTION}v_proj.weight": (64, 128),
    f"{ATTENTION}o_proj.weight": (128, 256),
    f"{MLP}gate_proj.weight": (256, 128),
    f"{MLP}up_proj.weight": (256, 128),
    f"{MLP}down_proj.weight": (128, 256),
    f"{MLP}experts.gate_up_proj": (3, 256, 128),  # gate and up in one, each cut by itself
    **{f"{MLP}experts.{number}.down_proj.weight": (64, 128) for number in range(4)},
    "model.norm.weight": (128,),
}


class Worker(nn.Module):
    """One of `size` workers: rows of what is fused into `qkv` and `gate_up`, columns of what follows, whole experts."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self._rank, self._size = rank, size
        kv = 64 // min(size, 2)
        shapes = {"embed": (256 // size, 128), "qkv": (256 // size + 2 * kv, 128), "o": (128, 256 // size)}
        shapes |= {"gate_up": (512 // size, 128), "down": (128, 256 // size)}
        shapes |= {"experts_in": (3, 256 // size, 128), "experts_out": (max(1, 4 // size), 128, 64), "norm": (128,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights):
        for name, tensor in weights:
            self._load(name, tensor)

    def _load(self, name, tensor):
        rank, size = self._rank, self._size
        rows = lambda length: slice(rank * length // size, (rank + 1) * length // size)  # noqa: E731
        kv, q = 64 // min(size, 2), 256 // size
        head = rank * min(size, 2) // size * kv  # with four workers two have the same head
        match name.removeprefix("model.layers.0.").removeprefix("model.").split("."):
            case ["embed_tokens", _]:
                part = tensor[rows(256)]
                self.embed.data[: len(part)].copy_(part)
            case ["self_attn", "q_proj", _]:
                self.qkv.data[:q].copy_(tensor[rows(256)])
            case ["self_attn", ("k_proj" | "v_proj") as kind, _]:
                start = q + (kv if kind == "v_proj" else 0)
                self.qkv.data.narrow(0, start, kv).copy_(tensor[head : head + kv])
            case ["self_attn", "o_proj", _]:
                self.o.data.copy_(tensor[:, rows(256)])
            case ["mlp", ("gate_proj" | "up_proj") as kind, _]:
                self.gate_up.data.narrow(0, q if kind == "up_proj" else 0, q).copy_(tensor[rows(256)])
            case ["mlp", "down_proj", _]:
                self.down.data.copy_(tensor[:, rows(256)])
            case ["mlp", "experts", "gate_up_proj"]:
                half = 128 // size
                for number, part in enumerate(tensor.chunk(2, 1)):
                    self.experts_in.data.narrow(1, number * half, half).copy_(part[:, rows(128)])
            case ["mlp", "experts", number, "down_proj", _] if int(number) * size // 4 == rank:
                self.experts_out.data[int(number) % len(self.experts_out)].copy_(tensor.t())
            case ["norm", _]:
                self.norm.data.copy_(tensor)


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
