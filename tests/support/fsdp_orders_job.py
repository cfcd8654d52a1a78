"""One rank of a real FSDP2 job, for test_fsdp_orders.py: publishes after its verbs in every order; called as
sharded_job.py. What a version holds must be the shards, whatever the model shows."""

import itertools
import random
import sys

import torch
import torch.distributed as dist
from runs import read_weights
from sharded_job import PATIENCE, as_base, breaking, expect, main, whole
from sharded_job import step as move
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from watchdog import FILES, Watchdog
from watchdog import publish as publish_again

import deltawire as dw
from deltawire.errors import DtypeMismatch, ShapeMismatch
from deltawire.publish.sharded import capture
from deltawire.trainers.hook import publish_after_step
from deltawire.trainers.state import checkpoint_tensors
from deltawire.weights.tensors import as_bits, equal

VERBS = ("forward", "evaluate", "backward", "step", "publish", "publish as shown", "state_dict")
MESHES = {1: [(1,)], 2: [(2,), (2, 1), (1, 2)]}


class Small(nn.Module):
    """Weights of the root itself, which stay gathered after a forward, and of two layers, which do not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden @ self.embed.weight.T


class Trainer:
    """A model and what one does with it; `shards` are its weights themselves, as they were before the first forward."""

    def __init__(self, mesh, folder, mixed):
        torch.manual_seed(0)
        self.model = Small()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
        for part in (*self.model.layers, self.model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        self.shards = [*self.model.named_parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.loss, self.moves, self.refused = None, 0, 0
        self.bucket = dw.open_bucket(f"file://{folder}")
        self.pub = dw.Publisher(self.bucket, process_group=dist.group.WORLD)

    def do(self, verb):
        {
            "forward": self.forward,
            "evaluate": self.evaluate,
            "backward": self.backward,
            "step": self.step,
            "publish": lambda: self.publish(checkpoint_tensors(self.model)),
            "publish as shown": self.publish_as_shown,
            "state_dict": self.model.state_dict,
        }[verb]()

    def forward(self):
        self.loss = self.model(torch.arange(6).reshape(2, 3)).square().mean()

    @torch.no_grad()
    def evaluate(self):
        self.model(torch.arange(3))

    def backward(self):
        if self.loss is not None:
            self.loss.backward()
            self.loss = None

    def step(self):
        self.optimizer.step()
        self.moves += 1
        move(self.shards, self.moves, share=0.5)  # where there was no backward, too

    def publish(self, pairs):
        self.pub.publish(pairs, step=self.moves)
        truth = whole(self.shards) | {"scale": as_bits(self.model.scale)}
        position = self.pub.flush(timeout=PATIENCE)
        if dist.get_rank() == 0:
            assert equal(read_weights(self.bucket, position.version), truth)
        dist.barrier()

    def publish_as_shown(self):
        pairs = [*self.model.named_parameters(), ("scale", as_bits(self.model.scale))]
        if all(isinstance(tensor, DTensor) for _, tensor in pairs[:-1]):
            self.publish(pairs)
        else:
            self.refused += 1
            expect(ShapeMismatch, "reshard", lambda: self.pub.publish(pairs, step=self.moves))


def run(folder, sequences):
    """Every mesh; a model and a run for each sequence of verbs."""
    size, refused = dist.get_world_size(), 0
    for shape in MESHES[size]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for number, verbs in enumerate(sequences):
            trainer = Trainer(mesh, folder / f"{shape}-{number}", mixed=number % 2)
            for done, verb in enumerate((*verbs, "step", "publish"), 1):
                try:
                    trainer.do(verb)
                except BaseException as error:
                    error.add_note(f"{shape}, {verbs}, at number {done}")
                    raise
            trainer.pub.close(timeout=PATIENCE)
            refused += trainer.refused
    assert refused, "no order made FSDP2 show anything but shards: this tests nothing"


def orders(folder):
    """What was found by hand first, and random orders."""
    draw = random.Random(1)
    found = [
        ("publish", "forward", "backward", "evaluate", "step", "publish", "publish as shown"),
        ("evaluate", "publish as shown", "publish", "step", "publish"),
        ("evaluate", "publish", "forward", "publish", "backward", "step"),
        ("forward", "step", "publish as shown", "backward"),
    ]
    every = [*found, *(draw.choices(VERBS, k=7) for _ in range(2))]
    run(folder, every)


def many_orders(folder):
    """Each verb once, in many of their orders."""
    draw = random.Random(2)
    run(folder, [draw.sample(VERBS, k=len(VERBS)) for _ in range(25)])


def hooks(folder):
    """A hook, which publishes from one process, refuses such a model even while it shows plain tensors."""
    model = Small()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with torch.no_grad():
        model(torch.arange(3))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    if dist.get_rank() == 0:
        with dw.Publisher(bucket) as pub:
            expect(DtypeMismatch, "sharded over processes", lambda: publish_after_step(pub, model, optimizer))
            expect(ShapeMismatch, "reshard", lambda: pub.publish(model.named_parameters()))
            views = [(name, parameter.detach()[:2]) for name, parameter in model.named_parameters()]
            expect(ShapeMismatch, "reshard", lambda: pub.publish(views))
    dist.barrier()


def gathered(folder):
    """Whole tensors given where a rank gives its shards, though on one rank the two are one box."""
    model = Small()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    pairs = [*model.named_parameters()]
    wholes = [(name, tensor.full_tensor()) for name, tensor in pairs]
    base = as_base(folder, whole(pairs))
    move(pairs, 1)
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, base=base, process_group=dist.group.WORLD) as pub:
        expect(RuntimeError, "optimizer state", lambda: pub.publish(breaking(wholes, 1)))  # on every rank
        assert pub.publish(pairs).version == 1  # the first publish was not: a rank may yet give another part
        pub.flush(timeout=PATIENCE)
        if dist.get_rank() == 0:
            found = read_weights(bucket, base=base)
        truth = whole(pairs)
        assert dist.get_rank() or equal(found, truth)
        with torch.no_grad():
            model(torch.arange(3))
        copies = [(name, parameter.detach().float().clone()) for name, parameter in model.named_parameters()]
        expect(ShapeMismatch, "reshard", lambda: pub.publish(copies))
        model.reshard()
        assert pub.publish(model.named_parameters()).version == 2


def torn(folder):
    """A watchdog's exception at any line of a rank's publish: true weights, or only a new publisher goes on. With one
    rank, for others would wait."""
    model, went_on = Small(), []
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    pairs = [*model.named_parameters()]
    for number in itertools.count(1, 9):
        bucket = dw.open_bucket(f"file://{folder}/{number}")
        begun, watchdog = number % 2, Watchdog(number, files=FILES | {capture.__file__})
        with dw.Publisher(bucket, process_group=dist.group.WORLD) as pub:
            for move_number in range(begun):
                move(pairs, move_number)
                pub.publish(pairs)
            move(pairs, number, share=0.5)
            try:
                with watchdog:
                    pub.publish(pairs)
            except TimeoutError:
                move(pairs, number + 1, share=0.5)
                went_on.append(publish_again(pub, pairs))
        if watchdog.where is None:
            break
        if not went_on[-1]:
            with dw.Publisher(bucket, process_group=dist.group.WORLD) as pub:
                pub.publish(pairs)
        assert equal(read_weights(bucket), whole(pairs)), watchdog.where
    assert {True, False} == {*went_on}


SCENARIOS = {scenario.__name__: scenario for scenario in (orders, many_orders, hooks, gathered, torn)}

if __name__ == "__main__":
    main(SCENARIOS, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
