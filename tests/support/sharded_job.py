"""One rank of a sharded job, for test_sharded.py: `sharded_job.py SCENARIO RANK SIZE PORT FOLDER`.

Each scenario trains tiny real FSDP2 or TP models by seeded edits of their shards, publishes to `file://FOLDER/…`, and
leaves what the whole tensors were in FOLDER, for the test to compare with what a reader gets.
"""

import faulthandler
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cpu_devices import DevicePublisher
from faults import Fault, Faulty, never, on_key
from runs import read_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import deltawire as dw
import deltawire.buckets.faulty as schedules
from deltawire.errors import (
    AccessRefused,
    BadSignature,
    CopiesDiffer,
    DeltaWireError,
    DtypeMismatch,
    MissingTensor,
    NotFound,
    RankFailed,
    ShapeMismatch,
    Truncated,
    Unavailable,
)
from deltawire.format import checkpoint
from deltawire.format.codecs import tiles
from deltawire.prepare.names import NameMap, View
from deltawire.publish import uploader
from deltawire.publish.sharded import channel, senders
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.signing import generate_key
from deltawire.trainers.state import checkpoint_tensors
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import cast, equal, mark_of

PATIENCE = 150.0


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
    if dist.get_rank() == 0 and not path.is_dir():
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


@contextmanager
def small_tiles():
    """Writes `class` in tiles of eight elements, where there are of 2^18."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 8), ("TARGET", 128), ("STEP", 1)):
            patch.setattr(tiles, name, value)
        yield


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
    bucket = dw.open_bucket(f"file://{folder}/bucket", create=True)
    if dist.get_rank() == 0:  # two workers hold half of the columns of these each
        said = Heartbeat("tp", at=time.time(), every=3600.0, cuts={"embed.weight": (0, 4), "down.weight": (0, 1)})
        heartbeats.beat(bucket, said)
    with small_tiles():
        reports = follow(bucket, folder, pairs, range(1, 4), base=base, codec="class")
    assert [report.version for report in reports] == [1, 2, 3]
    assert [report.codec for report in reports] == ["class"] * 3
    total = sum(tensor.numel() for _, tensor in pairs)
    assert all(report.total == total and 0 < report.changed < total / 2 for report in reports)
    # a new job, from the same base: it continues, and publishes the difference
    with small_tiles():
        (report,) = follow(bucket, folder, pairs, [4], base=base, codec="class")
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
        generate_key(folder / "key")
    options = {"assets": assets, "signing_key": folder / "key" if dist.get_rank() == 0 else folder / "not here"}
    codec = "class" if dist.get_rank() == 0 else "subset"  # rank 0 chooses for all
    with small_tiles():
        reports = follow(dw.open_bucket(f"file://{folder}/bucket"), folder, pairs, range(1, 4), codec=codec, **options)
    assert [report.version for report in reports] == [0, 1, 2]
    with pytest.raises(BadSignature, match="no signing_key was given"):  # on every rank, though rank 0 alone has it
        dw.Publisher(dw.open_bucket(f"file://{folder}/bucket"), process_group=dist.group.WORLD)
    follow(dw.open_bucket(f"file://{folder}/bucket"), folder, pairs, [4], **options)


def on_device(folder):
    """The same with every rank's baseline on a device, here the CPU in its place, which ranks by class:
    without a base, then resumed."""
    model = tiny()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    pairs = [*model.named_parameters(), ("scale", model.scale)]
    bucket, version = dw.open_bucket(f"file://{folder}/bucket"), 0
    options = {"baseline": "device", "codec": "class", "process_group": dist.group.WORLD}
    for steps in (range(1, 4), range(4, 6)):
        with small_tiles(), DevicePublisher(bucket, **options) as pub:
            for number in steps:
                step(pairs, number)
                given = dict(pairs) if number % 2 else iter(pairs)
                report = publish(pub, given)
                pub.flush(timeout=PATIENCE)
                assert (report.version, report.baseline) == (version, "device")
                assert report.codec == ("class" if version else "subset")
                assert report.wire_bytes, "ranks encode at once, for the report counts the bytes of all"
                save(folder, f"version-{version}", pairs)
                version += 1


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


def mixed(folder):
    """Some fp32 tensors beside bf16 ones: all ranks ship each in one dtype, and refuse a rule that fits nothing."""
    model = tiny().bfloat16()
    model.norm.float()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.norm, model):  # FSDP2 shards tensors of one dtype together
        fully_shard(part, mesh=mesh)
    pairs, norms = list(model.named_parameters()), ("norm.weight", "norm.bias")
    step(pairs, 1)
    rows = NameMap({name: (View(name, ((0, 3),), (0,)) if name == norms[0] else View(name),) for name, _ in pairs})

    def dtypes(name, tensors, **options):
        bucket = dw.open_bucket(f"file://{folder}/{name}")
        with dw.Publisher(bucket, process_group=dist.group.WORLD, **options) as pub:
            publish(pub, tensors)
            pub.flush(timeout=PATIENCE)
            step(pairs, 2)
            publish(pub, pairs if options else checkpoint_tensors(model))
        read = read_weights(bucket)
        for tensor, part in pairs:
            assert read[tensor] == cast(part.full_tensor(), read[tensor].dtype), (name, tensor)
        return {read[tensor].dtype for tensor in norms}, {read[t].dtype for t, _ in pairs if t not in norms}

    assert dtypes("kept", checkpoint_tensors(model)) == ({"F32"}, {"BF16"})
    assert dtypes("asked", pairs, dtype={"norm.*": "F32"}) == ({"F32"}, {"BF16"})
    assert dtypes("narrow", pairs, dtype={"norm.*": "BF16"}) == ({"BF16"}, {"BF16"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert dtypes("rounded", pairs, dtype={"*": "BF16"}) == ({"BF16"}, {"BF16"})
    assert ["norm.weight, norm.bias" in str(warning.message) for warning in caught] == [True] * (dist.get_rank() == 0)
    kept = [(name, tensor) for name, tensor in checkpoint_tensors(model) if name in norms]
    assert [mark_of(view) for _, view in rows(kept)] == ["kept"] * 2
    with dw.Publisher(
        dw.open_bucket(f"file://{folder}/none"), process_group=dist.group.WORLD, dtype={"x": "F32"}
    ) as pub:
        expect(DtypeMismatch, "'x', which fits no tensor", lambda: publish(pub, pairs))


def shard_all(folder):
    """A tiny model sharded over all ranks, its base, and what to publish of it."""
    model = tiny()
    base = as_base(folder, whole([*model.named_parameters(), ("scale", model.scale)]))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return base, [*model.named_parameters(), ("scale", model.scale)]


def breaking(pairs, number):
    yield from pairs[:number]
    raise RuntimeError("the optimizer state is gone")


def captures(folder):
    """One rank's capture fails, in every way: all raise, nothing is published, and nothing is lost."""
    base, pairs = shard_all(folder)
    second = dist.get_rank() == 1
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, base=base, process_group=dist.group.WORLD) as pub:
        step(pairs, 1)
        # the first publish, when no run exists yet
        expect(MissingTensor, "rank 1 gave other tensors", lambda: publish(pub, pairs[:-1] if second else pairs))
        kind, why = (RuntimeError, "optimizer state") if second else (RankFailed, "rank 1 of this job could not")
        expect(kind, why, lambda: publish(pub, breaking(pairs, 2) if second else pairs))
        assert pub.position is None
        assert publish(pub, pairs).version == 1
        save(folder, "version-1", pairs)
        pub.flush(timeout=PATIENCE)
        # a later one: what each rank captured before the failure goes with the next
        step(pairs, 2)
        expect(kind, why, lambda: publish(pub, breaking(pairs, 3) if second else pairs))
        kind, why = (ValueError, "could not convert") if second else (RankFailed, "rank 1")
        expect(kind, why, lambda: publish(pub, pairs, metrics={"reward": "high" if second else 0.5}))
        step(pairs, 3)
        assert publish(pub, pairs, metrics={"reward": 0.5}).version == 2
        save(folder, "version-2", pairs)
        # copies that differ
        step(pairs, 4)
        scale = pairs[-1][1]
        scale.add_(float(second))
        expect(CopiesDiffer, "scale", lambda: publish(pub, pairs))
        scale.sub_(float(second))
        # a publish too many on one rank
        expect(MissingTensor, "another step", lambda: publish(pub, pairs, step=7 if second else 8))
        # whole tensors where there were shards
        gathered = [(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) for name, tensor in pairs]
        expect(ShapeMismatch, "reshard", lambda: publish(pub, gathered))
        assert publish(pub, pairs).version == 3
        save(folder, "version-3", pairs)
    expect(DeltaWireError, "is closed", lambda: publish(pub, pairs))
    # a run that begins from nothing fails to begin, and then begins
    bucket = dw.open_bucket(f"file://{folder}/zeros")
    with dw.Publisher(bucket, process_group=dist.group.WORLD) as pub:
        expect(Exception, "", lambda: publish(pub, breaking(pairs, 3) if second else pairs))
        expect(MissingTensor, "rank 1 gave other", lambda: publish(pub, pairs[1:] if second else pairs))
        assert publish(pub, pairs).version == 0
        pub.flush(timeout=PATIENCE)
        assert equal(read_weights(bucket), whole(pairs))


def uploads(folder):
    """One rank's upload fails: flush raises on every rank, the next one succeeds, what waited is folded alike."""
    base, pairs = shard_all(folder)
    rank = dist.get_rank()
    bucket = Faulty(dw.open_bucket(f"file://{folder}/bucket"))
    with dw.Publisher(bucket, base=base, process_group=dist.group.WORLD) as pub:
        step(pairs, 0)
        publish(pub, pairs)
        save(folder, "version-1", pairs)
        pub.flush(timeout=PATIENCE)
        for failing, part, version in ((1, ".r001-", 2), (0, ".r000-", 3), (0, "commits/", 4)):
            if rank == failing:
                bucket.plan = on_key(part, times=1 << 30, error=AccessRefused("the token has expired"))
            step(pairs, version)
            publish(pub, pairs)
            for _ in range(2):
                error = expect(AccessRefused, "expired", lambda: pub.flush(timeout=PATIENCE))
                assert (f"rank {failing}" in str(error)) == (failing == 1 and rank == 0)
            assert pub.position.version == version - 1
            dist.barrier()
            bucket.plan = never
            save(folder, f"version-{version}", pairs)
            assert pub.flush(timeout=PATIENCE).version == version
        # many versions, a store that keeps failing on both: ranks fold what waits at the same places
        draw = random.Random(rank)
        bucket.plan = lambda n, key: Fault(Unavailable("later"), draw.random() < 0.5) if draw.random() < 0.5 else None
        for number in range(5, 45):
            step(pairs, number)
            report = publish(pub, pairs)
            assert report.waiting_bytes <= report.waiting_bound + 4096 * len(pairs)
        bucket.plan = never
        assert pub.flush(timeout=PATIENCE).version == report.version == 44
        save(folder, "version-44", pairs)


def train(folder):
    """Six steps from the newest checkpoint of its own, each saved before it is published. It may be killed anywhere."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = tiny()
    base = as_base(folder, whole([*model.named_parameters(), ("scale", model.scale)]))
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    pairs = [*model.named_parameters(), ("scale", model.scale)]

    def file(number, of):
        return folder / f"state-{number}-{of}.pt"

    def local(tensor):
        return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor

    done = max((n for n in range(1, 7) if all(file(n, of).is_file() for of in range(size))), default=0)
    dist.barrier()
    if done:
        for (_, tensor), saved in zip(pairs, torch.load(file(done, rank)), strict=True):
            local(tensor).copy_(saved)
    bucket = schedules.Faulty(
        dw.open_bucket(f"file://{folder}/bucket"), lambda call: schedules.Fault("delay", seconds=0.05)
    )
    with dw.Publisher(bucket, base=base, process_group=dist.group.WORLD) as pub:
        for number in range(done + 1, 7):
            step(pairs, number)
            torch.save([local(tensor) for _, tensor in pairs], file(number, f"new{rank}"))
            file(number, f"new{rank}").rename(file(number, rank))
            dist.barrier()
            publish(pub, pairs, step=number)
            pub.flush(timeout=PATIENCE)
        if done == 6:
            publish(pub, pairs, step=6)
    save(folder, "version-6", pairs)


def apart(folder):
    """Ranks whose buckets are not one, as a folder on each host's own disk: no commit refers to what is not there."""
    base, pairs = shard_all(folder)
    rank = dist.get_rank()
    with dw.Publisher(
        dw.open_bucket(f"file://{folder}/host-{rank}/bucket", create=True), base=base, process_group=dist.group.WORLD
    ) as pub:
        step(pairs, 1)
        publish(pub, pairs)
        error = expect(NotFound, "must open one bucket", lambda: pub.flush(timeout=PATIENCE))
        assert "what rank 1 wrote is not there" in str(error)
        dist.barrier()
        for part in (folder / "host-1" / "bucket").rglob("*.safetensors"):
            there = folder / "host-0" / "bucket" / part.relative_to(folder / "host-1" / "bucket")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part, there)
        assert pub.flush(timeout=PATIENCE).version == 1


def damaged(folder):
    """A run that cannot be continued because a file of it is damaged leaves no rank's download behind."""
    _, pairs = shard_all(folder)
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, process_group=dist.group.WORLD) as pub:
        publish(pub, pairs)
    dist.barrier()
    if dist.get_rank() == 0:
        (part,) = (folder / "bucket").rglob("*r001*")
        part.write_bytes(part.read_bytes()[:-3])
    dist.barrier()
    tempfile.tempdir = str(folder / f"temporary-{dist.get_rank()}")
    os.mkdir(tempfile.tempdir)
    expect(Truncated, "bytes", lambda: dw.Publisher(bucket, process_group=dist.group.WORLD))
    really, dist.broadcast_object_list = dist.broadcast_object_list, broken
    expect(RankFailed, "is gone", lambda: dw.Publisher(bucket, process_group=dist.group.WORLD))
    dist.broadcast_object_list = really
    assert os.listdir(tempfile.tempdir) == []
    tempfile.tempdir = None


def broken(*_, **__):
    """As gloo says that a rank was killed."""
    raise RuntimeError("Connection closed by peer")


def stuck(folder, error=None):
    """Two ranks that have published once; what rank 1 captured next is not durable, and cannot be."""
    base, pairs = shard_all(folder)
    never_set = threading.Event()
    bucket = Faulty(dw.open_bucket(f"file://{folder}/bucket"))
    pub = dw.Publisher(bucket, base=base, process_group=dist.group.WORLD)
    step(pairs, 1)
    publish(pub, pairs)
    pub.flush(timeout=PATIENCE)
    if dist.get_rank() == 1:
        bucket.plan = on_key(".r001-", times=1 << 30, error=error) if error else lambda n, key: never_set.wait()
    step(pairs, 2)
    publish(pub, pairs)
    return pub


def closes(folder):
    """A rank that closes before its changes are durable: rank 0 does not wait for them."""
    pub = stuck(folder, Unavailable("later"))
    if dist.get_rank() == 1:
        expect(Unavailable, "not all committed", lambda: pub.close(timeout=0.5))
    else:
        expect(RankFailed, "rank 1 was closed before", lambda: pub.flush(timeout=PATIENCE))
        expect(RankFailed, "rank 1 was closed before", lambda: pub.close(timeout=PATIENCE))
    assert pub.position.version == 1


def stops(folder):
    """A rank whose uploader stops for good tells the others why."""
    base, pairs = shard_all(folder)
    bucket = dw.open_bucket(f"file://{folder}/bucket")

    def refuse(report):
        if dist.get_rank() == 1:
            raise ValueError("the caller's own")

    pub = dw.Publisher(bucket, base=base, process_group=dist.group.WORLD, on_upload=refuse)
    step(pairs, 1)
    publish(pub, pairs)
    for act in (pub.flush, pub.close):
        error = expect(DeltaWireError, "the caller's own", lambda act=act: act(timeout=PATIENCE))
        assert ("rank 1" in str(error)) == (dist.get_rank() == 0)


def gone(folder):
    """A rank that is killed before its changes are durable: rank 0 finds out. The last scenario of a job."""
    channel.GONE = 1.0
    pub = stuck(folder)
    if dist.get_rank() == 0:
        expect(RankFailed, "rank 1 gave no sign of life", lambda: pub.flush(timeout=PATIENCE))
        expect(RankFailed, "rank 1 gave no sign of life", lambda: pub.close(timeout=PATIENCE))
    os._exit(0)


class Tied(Tiny):
    """A head that is the embedding, under transformers' names; one rank of four holds none of `few`."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(31, 8)
        self.few = nn.Embedding(3, 8)
        self.lm_head = nn.Linear(8, 31, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def tied(folder):
    """A state dict that names a tied tensor twice: with a base whose file has it twice, and from nothing; and a head
    that was untied in memory, which is another tensor though the config ties it."""
    torch.manual_seed(0)
    model, second = Tied(), dist.get_rank() == 1
    base = as_base(folder, whole(model.state_dict().items()))
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    assert {"embed_tokens.weight", "lm_head.weight"} <= model.state_dict().keys()
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, base=base, process_group=dist.group.WORLD) as pub:
        given = [*model.state_dict().items()]
        kind, why = (RuntimeError, "optimizer state") if second else (RankFailed, "rank 1 of this job could not")
        expect(kind, why, lambda: publish(pub, breaking(given, 2) if second else given))
        for number in range(1, 4):
            step([*model.named_parameters()], number)
            publish(pub, [*model.named_parameters(), ("scale", model.scale)] if number == 2 else model.state_dict())
            pub.flush(timeout=PATIENCE)
            assert equal(
                read_weights(bucket, base=base), whole(model.named_parameters()) | whole(model.named_buffers())
            )
        apart = [(name, tensor * 2 if name == "lm_head.weight" else tensor) for name, tensor in given]
        expect(CopiesDiffer, "lm_head.weight is another name", lambda: publish(pub, apart))
        assert publish(pub, model.state_dict()).version == 4
    assert dw.Subscriber(bucket).run.format == 3
    for place, options in (("zeros", {}), ("alone", {"base": base})):
        bucket = dw.open_bucket(f"file://{folder}/{place}")
        pairs = [*model.state_dict().items()]
        with dw.Publisher(bucket, process_group=dist.group.WORLD, **options) as pub:
            expect(
                kind,
                why,
                lambda pub=pub, given=pairs: publish(pub, breaking(given, len(given) - 1) if second else given),
            )
            step([*model.named_parameters()], 7)
            if options:  # the head by its own name only
                pairs = [pair for pair in pairs if pair[0] != "embed_tokens.weight"]
            publish(pub, pairs)
            pub.flush(timeout=PATIENCE)
        right = whole(model.named_parameters()) | whole(model.named_buffers())
        assert equal(read_weights(bucket, base=base), right)
        assert dw.Subscriber(bucket).run.format == 3
    untied = Tied()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    fully_shard(untied, mesh=mesh)
    bucket = dw.open_bucket(f"file://{folder}/untied")
    with dw.Publisher(bucket, base=base, process_group=dist.group.WORLD) as pub:
        for number in (5, 6):
            publish(pub, untied.state_dict())
            step([*untied.named_parameters()], number)
    right = dw.Subscriber(bucket).run
    assert (right.format, len(right.table)) == (3, len(untied.state_dict()))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        fsdp,
        hsdp,
        tp_fsdp,
        on_device,
        mixed,
        captures,
        uploads,
        train,
        apart,
        damaged,
        tied,
        closes,
        stops,
        gone,
    )
}


def main(scenarios, names, rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)  # a hang says where, and ends
    uploader.FIRST_RETRY, uploader.LAST_RETRY, senders.BEAT = 0.01, 0.1, 0.1
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for name in names.split(","):
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        scenarios[name](place)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(SCENARIOS, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
