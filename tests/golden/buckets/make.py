"""Make the golden buckets: what deltawire wrote before its first release. Run by hand, by that commit's own code:

    git worktree add /tmp/deltawire-old 14b47c4
    PYTHONPATH=/tmp/deltawire-old/src python tests/golden/buckets/make.py

It refuses to overwrite: a committed golden file never changes, or it would stop proving that old buckets stay readable.
NAME.zip holds `bucket/`, the keys and the base where there are any, and `expected.npz`: the bits of each version, keyed
"VERSION/TENSOR", which are the script's own and not read back from the bucket.

    based      starts from a folder; one tensor is frozen, one is fp32; folds, anchors
    signed     version 0 is an anchor; signed by a trainer's key, folds and anchors by a compactor's
    sharded    two ranks, one file a rank, from all-zero bits on; folds, an anchor

Commits are 0 to 5 and 7, in which 6 was folded.
"""

import importlib
import secrets
import shutil
import socket
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.torch import save_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from deltawire import Publisher, open_bucket

Compactor = importlib.import_module(".compactor", "deltawire").Compactor  # where that commit had it

HERE = Path(__file__).parent
WORK = Path("/tmp/deltawire-golden")
"""written into the run record of `based`, so it is nobody's home"""
CREATED = 1_790_000_000.0
VERSIONS = range(8)
HELD = (5, 6, 7)
"""published while the store does not answer: 5 is on its way, 6 and 7 fold"""
SHAPES = {"embed.weight": (31, 8), "frozen.weight": (4, 4), "layer.bias": (16,), "layer.weight": (16, 8), "norm": (3,)}
CONFIG = '{"architectures": ["None"], "tie_word_embeddings": false}\n'


class Stalling:
    """A bucket whose writes wait while `open` is not set; `asked` is set by the first that waits."""

    def __init__(self, bucket):
        self._bucket, self.open, self.asked = bucket, threading.Event(), threading.Event()
        self.open.set()

    def __getattr__(self, name):
        return getattr(self._bucket, name)

    def put_new(self, key, data):
        if not self.open.is_set():
            self.asked.set()
        self.open.wait()
        self._bucket.put_new(key, data)


def bits_of(version):
    """The bits of every version: random at first, then a tenth of each tensor is drawn again. -0.0 and NaN occur."""
    draw = np.random.default_rng(14)
    found = {name: draw.integers(0, 1 << 16, shape, np.uint16) for name, shape in SHAPES.items()}
    found["scale"] = draw.integers(0, 1 << 32, (5,), np.uint32)
    for _ in range(version):
        for data in found.values():
            where = draw.random(data.shape) < 0.1
            data[where] = draw.integers(0, np.iinfo(data.dtype).max, int(where.sum()), data.dtype)
    found["frozen.weight"][:] = 0x3F80
    found["norm"][:2] = 0x8000, 0x7FC1
    return found


def tensors_of(version, names):
    kinds = {2: torch.bfloat16, 4: torch.float32}
    found = {name: data for name, data in bits_of(version).items() if name in names}
    return {name: torch.from_numpy(data).view(kinds[data.itemsize]) for name, data in found.items()}


def key_file(path, byte):
    """A key that is the same every time, for these files alone."""
    key = Ed25519PrivateKey.from_private_bytes(bytes([byte]) * 32)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key.public_key().public_bytes_raw().hex()


def publish(bucket, publisher, names, give=lambda tensor: tensor):
    """Every version in a commit of its own, but for the one that folds."""
    for version in VERSIONS:
        if version == HELD[0]:
            bucket.open.clear()
        pairs = [(name, give(tensor)) for name, tensor in tensors_of(version, names).items()]
        publisher.publish(pairs, step=10 * version, metrics={"reward": version / 4})
        if version == HELD[0]:
            bucket.asked.wait()
        if version not in HELD:
            publisher.flush()
    bucket.open.set()
    publisher.flush()


def compact(folder, **options):
    """Folds of 2 and 4 versions, and an anchor of the newest."""
    with Compactor(open_bucket((folder / "bucket").as_uri()), folder / "mirror", levels=(2, 4), **options) as compactor:
        compactor.step()
    shutil.rmtree(folder / "mirror")


def make_based(folder):
    names = [*SHAPES, "scale"]
    base = folder / "base"
    base.mkdir()
    save_file(tensors_of(0, names), base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(CONFIG)
    bucket = Stalling(open_bucket((folder / "bucket").as_uri(), create=True))
    with Publisher(bucket, base=base, clock=lambda: CREATED) as publisher:
        publish(bucket, publisher, [name for name in names if name != "frozen.weight"])
    compact(folder, anchors=4, base=base)


def make_signed(folder):
    (folder / "assets").mkdir()
    (folder / "assets" / "config.json").write_text(CONFIG)
    key_file(folder / "trainer.pem", 1)
    delegate = key_file(folder / "compactor.pem", 2)
    bucket = Stalling(open_bucket((folder / "bucket").as_uri(), create=True))
    options = {"signing_key": folder / "trainer.pem", "compactors": [delegate], "clock": lambda: CREATED}
    with Publisher(bucket, assets=folder / "assets", **options) as publisher:
        publish(bucket, publisher, SHAPES)
    compact(folder, anchors=4, signing_key=folder / "compactor.pem")


def make_sharded(folder):
    processes.spawn(rank, (folder,), nprocs=2)
    compact(folder, anchors=4)


def rank(number, folder):
    """One rank of the job: rows are dealt out, a tensor of one dimension too."""
    steady()
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=number, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    bucket = Stalling(open_bucket((folder / "bucket").as_uri(), create=True))
    with Publisher(bucket, process_group=dist.group.WORLD, clock=lambda: CREATED) as publisher:
        publish(bucket, publisher, SHAPES, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    dist.destroy_process_group()


def steady():
    """What would be another in every run: the run's id, and who wrote it."""
    secrets.token_hex = lambda size: "14b47c4".ljust(2 * size, "0")
    socket.gethostname = lambda: "localhost"


def pack(folder, path):
    """All that is in the folder as one file."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name != "ranks":
                archive.writestr(
                    zipfile.ZipInfo(str(file.relative_to(folder))), file.read_bytes(), zipfile.ZIP_DEFLATED
                )


def main():
    """Each bucket as a file; an existing one is an error."""
    steady()
    for name, make in {"based": make_based, "signed": make_signed, "sharded": make_sharded}.items():
        folder = WORK / name
        folder.mkdir(parents=True)
        make(folder)
        names = [*SHAPES, "scale"] if name == "based" else [*SHAPES]
        of = {f"{v}/{n}": data for v in VERSIONS for n, data in bits_of(v).items() if v != HELD[1] and n in names}
        np.savez(folder / "expected.npz", **of)
        pack(folder, HERE / f"{name}.zip")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    sys.exit(main())
