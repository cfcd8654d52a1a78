"""One rank of a sharded job, for test_sharded.py: `sharded_job.py SCENARIO RANK SIZE PORT FOLDER`.

Each scenario trains tiny real FSDP2 or TP models by seeded edits of their shards, publishes to `file://FOLDER/…`, and
leaves what the whole tensors were in FOLDER, for the test to compare with what a reader gets.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import deltawire as dw
from deltawire import checkpoint, publisher
from deltawire.manifests import TensorEntry
from deltawire.tensors import cast

PATIENCE = 120.0


class Tiny(nn.Module):
    """Rows that do not divide by 2 or 4, a tensor with fewer rows than ranks, a scalar-like norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.up = nn.Linear(8, 22, bias=False)
        self.down = nn.Linear(22, 8)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("scale", torch.ones(()))


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def whole(pairs):
    """The whole tensors' served bits. Gathers: for comparing only, never inside a publish."""
    found = {}
    for name, tensor in pairs:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = cast(full.detach(), "BF16").copy()
    return found


def save(folder, label, pairs):
    bits = whole(pairs)
    if dist.get_rank() == 0:
        np.savez(folder / f"{label}.npz", **{name: value.data.reshape(value.shape) for name, value in bits.items()})
    return bits


def as_base(folder, bits):
    """A checkpoint folder of these bits, written by rank 0."""
    path = folder / "base"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        checkpoint.write(path, [TensorEntry(name, value.dtype, value.shape) for name, value in bits.items()], bits)
        (path / "config.json").write_text("{}")
    dist.barrier()
    return path


def step(pairs, seed, share=0.1):
    """An optimizer step: every rank moves its shards in place, and those that hold copies move them alike."""
    for number, (_, tensor) in enumerate(pairs):
        place = [seed, number]
        if isinstance(tensor, DTensor):
            at = tensor.device_mesh.get_coordinate()
            place += [at[dim] for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        rng = np.random.default_rng(place)
        local = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
        moves = rng.normal(0, 0.05, tuple(local.shape)) * (rng.random(tuple(local.shape)) < share)
        local.add_(torch.as_tensor(moves, dtype=local.dtype))


@contextmanager
def no_gather():
    """Fails if anything but our own sums runs inside."""
    with CommDebugMode() as seen:
        yield
    counts = {str(op): count for op, count in seen.get_comm_counts().items()}
    assert not any("gather" in op or "scatter" in op for op in counts), counts


def check_that_a_gather_would_be_seen(tensor):
    with CommDebugMode() as seen:
        tensor.full_tensor()
    assert any("gather" in str(op) for op in seen.get_comm_counts()), seen.get_comm_counts()


def publish(pub, pairs, **options):
    with no_gather():
        return pub.publish(pairs, **options)


def expect(kind, match, action):
    try:
        action()
    except kind as error:
        assert match in str(error), str(error)
        return error
    raise AssertionError(f"no {kind.__name__}")


def follow(bucket, folder, pairs, steps, **options):
    """Publish some steps, each a commit of its own; the whole tensors at each are left in the folder."""
    reports = []
    with dw.Publisher(bucket, process_group=dist.group.WORLD, **options) as pub:
        for number in steps:
            step(pairs, number)
            reports.append(publish(pub, iter(pairs), step=number))
            save(folder, f"version-{reports[-1].version}", pairs)
            pub.flush(timeout=PATIENCE)
    return reports


def fsdp(folder):
    """`fully_shard` over all ranks, with a buffer that every rank has whole."""
    model = tiny()
    base = as_base(folder, whole([*model.named_parameters(), ("scale", model.scale)]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pairs = [*model.named_parameters(), ("scale", model.scale)]
    check_that_a_gather_would_be_seen(pairs[0][1])
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    reports = follow(bucket, folder, pairs, range(1, 4), base=base)
    assert [report.version for report in reports] == [1, 2, 3]
    total = sum(tensor.numel() for _, tensor in pairs)
    assert all(report.total == total and 0 < report.changed < total / 2 for report in reports)
    # a new job, from the same weights: it continues, and publishes the difference
    (report,) = follow(bucket, folder, pairs, [4])
    assert report.version == 4


def hsdp(folder):
    """Copies of shards: a 2-D mesh whose first dimension replicates; without a base."""
    model = tiny()
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    pairs = [*model.named_parameters(), ("scale", model.scale)]
    assets = folder / "assets"
    if dist.get_rank() == 0:  # only there, as on a cluster without shared disks
        assets.mkdir()
        (assets / "config.json").write_text("{}")
    reports = follow(dw.open_bucket(f"file://{folder}/bucket"), folder, pairs, range(1, 4), assets=assets)
    assert [report.version for report in reports] == [0, 1, 2]
    follow(dw.open_bucket(f"file://{folder}/bucket"), folder, pairs, [4])


def tp_fsdp(folder):
    """A tensor-parallel model, sharded again by FSDP: strided shards, columns, and layers that TP leaves alone."""
    model = tiny()
    base = as_base(folder, whole([*model.named_parameters(), ("scale", model.scale)]))
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    pairs = [*model.named_parameters(), ("scale", model.scale)]
    assert len({str(tensor.placements) for _, tensor in pairs[:-1]}) >= 3
    follow(dw.open_bucket(f"file://{folder}/bucket"), folder, pairs, range(1, 4), base=base)


SCENARIOS = {"fsdp": fsdp, "hsdp": hsdp, "tp_fsdp": tp_fsdp}


def main(scenarios, rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    publisher.FIRST_RETRY, publisher.LAST_RETRY = 0.01, 0.1
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for scenario in scenarios.split(","):
        place = Path(folder) / scenario
        place.mkdir(exist_ok=True)
        SCENARIOS[scenario](place)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
