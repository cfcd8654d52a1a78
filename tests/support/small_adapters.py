"""A run of one small adapter, and what a stand-in server would answer with."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stub_engine import StubEngine

import deltawire as dw
from deltawire.vllm.adapters import AdapterFollower

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class SmallAdapterRun:
    """One matrix under a PEFT name; each version is the one before and 1."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.url = folder, (folder / "bucket").as_uri()
        (folder / "config").mkdir()
        (folder / "config" / "adapter_config.json").write_text("{}")
        self.publisher = dw.Publisher(dw.open_bucket(self.url, create=True), assets=folder / "config", **options)
        self.versions = 0
        self.publish()

    def publish(self) -> None:
        self.publisher.publish({NAME: torch.full((8, 64), float(self.versions))})
        self.publisher.flush(10)
        self.versions += 1

    def follower(self, engine: StubEngine, **options) -> AdapterFollower:
        return AdapterFollower(self.url, engine.url, "lora", folder=self.folder / "cache", **options)

    def served(self, engine: StubEngine) -> dict[str, float]:
        """What the server would answer with: the value that each name's folder holds."""
        held = {name: load_file(Path(folder) / "adapter_model.safetensors") for name, folder in engine.adapters.items()}
        return {name: float(tensors[NAME][0, 0]) for name, tensors in held.items()}
