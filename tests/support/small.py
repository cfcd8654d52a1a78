"""A model fused as vLLM fuses them, small enough to look at, and runs that train it."""

import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltawire as dw

ROWS, COLUMNS = 8, 100
DEVICE = torch.device("cpu")
"""where models are put"""


class Fused(nn.Module):
    """Two checkpoint matrices, `a` and `b`, in one parameter, and a vector `v`."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.ab = nn.Parameter(torch.cat([weights["a"], weights["b"]]).bfloat16(), requires_grad=False)
        self.v = nn.Parameter(weights["v"].bfloat16(), requires_grad=False)
        self.to(DEVICE)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "v":
                self.v.data.copy_(tensor)
            else:
                self.ab.data.narrow(0, 0 if name == "a" else ROWS, ROWS).copy_(tensor)

    def served(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors as they are now."""
        return {"a": self.ab[:ROWS].clone(), "b": self.ab[ROWS:].clone(), "v": self.v.clone()}


class Shard(nn.Module):
    """One of two workers' part of `Fused`: half of the rows of `a` and `b`, and all of `v`."""

    def __init__(self, weights: dict[str, torch.Tensor], rank: int, *, without: str = "") -> None:
        super().__init__()
        self._rows, self._without = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), without
        parts = [weights["a"][self._rows], weights["b"][self._rows]]
        self.ab = nn.Parameter(torch.cat(parts).bfloat16(), requires_grad=False)
        self.v = nn.Parameter(weights["v"].bfloat16(), requires_grad=False)
        self.to(DEVICE)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == self._without:
                continue
            if name == "v":
                self.v.data.copy_(tensor)
            else:
                self.ab.data.narrow(0, 0 if name == "a" else ROWS // 2, ROWS // 2).copy_(tensor[self._rows])

    @staticmethod
    def served(shards: list["Shard"]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors as the workers hold them together."""
        half = ROWS // 2
        parts = {"a": slice(0, half), "b": slice(half, ROWS)}
        whole = {name: torch.cat([shard.ab[rows] for shard in shards]) for name, rows in parts.items()}
        return {**whole, "v": shards[0].v.clone()}


def make_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """What a trainer starts from, in fp32."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (ROWS, COLUMNS), "b": (ROWS, COLUMNS), "v": (16,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


class SmallRun:
    """A run whose every version is kept: `versions[n]` are its bits as a server must hold them."""

    def __init__(self, folder: Path | None = None, *, seed: int = 0, **options: Any) -> None:
        self.url = folder.as_uri() if folder else f"memory://{secrets.token_hex(8)}"
        self.weights = make_weights(seed)
        self.publisher = dw.Publisher(dw.open_bucket(self.url, create=True), **options)
        self.versions: list[dict[str, torch.Tensor]] = []
        self.publish()

    def __enter__(self) -> "SmallRun":
        return self

    def __exit__(self, *exc: object) -> None:
        self.publisher.close(10)

    def publish(self, **moves: float) -> int:
        """Add to one row of each named tensor, and commit; the version."""
        for name, move in moves.items():
            self.weights[name][len(self.versions) % ROWS] += move
        self.publisher.publish(self.weights)
        self.publisher.flush(10)
        self.versions.append({name: tensor.bfloat16() for name, tensor in self.weights.items()})
        return len(self.versions) - 1

    def model(self, version: int = 0) -> Fused:
        """A server's model that stands on a version."""
        return Fused(self.versions[version])
