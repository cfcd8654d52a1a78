"""One end of the wire for weights of some size, told on standard input what to do; it answers a JSON line for each.

    python large.py trainer|engine BUCKET ELEMENTS FOLDER

`trainer` publishes: `publish DENSITY`, and `upload` sends the same weights as a plain checkpoint. `engine` holds a
torch module that follows: `follow VERSION`, and `download` takes such a checkpoint. `digests` tells what each holds.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltawire as dw
from deltawire.runlog.keys import HEAD_KEY
from deltawire.torch import follow

PARTS = 6
PLAIN = "plain/model.safetensors"
POLL, PATIENCE = 0.2, 120.0
"""seconds"""


def trainer(bucket_url: str, elements: int, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{i}.weight": torch.empty(elements // PARTS // 1024, 1024)
        .normal_(0, 0.02, generator=generator)
        .bfloat16()
        for i in range(PARTS)
    }
    bucket = dw.open_bucket(bucket_url, create=True)
    publisher = dw.Publisher(bucket)

    def change(density: float) -> None:
        """Move a share of all elements one step up or down, as an optimizer does at the learning rates of RL."""
        for tensor in weights.values():
            bits = tensor.view(torch.int16).view(-1)
            picked = torch.randperm(bits.numel(), generator=generator)[: round(bits.numel() * density)]
            bits[picked] += torch.randint(0, 2, picked.shape, generator=generator, dtype=torch.int16) * 2 - 1

    def publish(density: str) -> dict[str, Any]:
        change(float(density))
        began = time.monotonic()
        report = publisher.publish(weights)
        publisher.flush()
        return {"began": began, "stored": time.monotonic(), "bytes": report.wire_bytes}

    def upload() -> dict[str, Any]:
        began = time.monotonic()
        save_file(weights, folder / "sent.safetensors")
        bucket.put(PLAIN, folder / "sent.safetensors")
        return {"began": began, "stored": time.monotonic(), "bytes": (folder / "sent.safetensors").stat().st_size}

    return {"publish": publish, "upload": upload, "digests": lambda: dw.digest(weights)}


def engine(bucket_url: str, elements: int, folder: Path) -> Any:
    module = nn.Module()
    module.layers = nn.ModuleList(
        nn.Linear(1024, elements // PARTS // 1024, bias=False, dtype=torch.bfloat16) for _ in range(PARTS)
    )
    module.requires_grad_(False)
    bucket = dw.open_bucket(bucket_url)
    follower: Any = None
    seen: list[str | None] = [None]

    def follow_to(version: str) -> dict[str, Any]:
        """Serve what HEAD names as soon as it does, until that is the version."""
        nonlocal follower
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = bucket.watch(HEAD_KEY, tag=seen[0], timeout=POLL)
            if found is None:
                continue
            seen[0] = found.tag
            follower = follower or follow(module, bucket_url)
            if follower.step().version >= int(version):
                return {"version": int(version), "served": time.monotonic()}
        raise TimeoutError(f"version {version} did not come in {PATIENCE:.0f} s")

    def download() -> dict[str, Any]:
        bucket.get_file(PLAIN, folder / "received.safetensors", limit=4 * elements)
        module.load_state_dict(load_file(folder / "received.safetensors"))
        return {"served": time.monotonic()}

    def digests() -> dict[str, int]:
        held: dict[str, Tensor] = dict(module.named_parameters())
        return dw.digest(held)

    return {"follow": follow_to, "download": download, "digests": digests}


def main() -> None:
    role, bucket_url, elements, folder = sys.argv[1:]
    torch.set_num_threads(1)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    verbs = {"trainer": trainer, "engine": engine}[role](bucket_url, int(elements), place)
    sys.stdout.write(json.dumps({"ready": role}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        verb, *arguments = line.split()
        sys.stdout.write(json.dumps(verbs[verb](*arguments)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
