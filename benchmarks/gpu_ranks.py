"""Ranking by class where the weights lie, and by one core of the host."""

import time

import torch

from deltawire.format.codecs import ranks, tiles, twins
from deltawire.format.codecs.classes import SCHEMES
from gpu_bounds import Copies, milliseconds
from gpu_table import Table
from gpu_weights import Weights

ROUNDS = 3


def measure_ranks(weights: Weights, share: float, copies: Copies, table: Table) -> None:
    """Print how long it takes to rank a share of bf16 weights by class, beside the time to read all weights once."""
    table.require_time()
    tensors, at = [], []
    for name, tensor in weights.tensors.items():
        size = tensor.numel()
        count = max(1, int(share * size))
        at.append(torch.unique(torch.randint(size, (count,), device=weights.device)))
        old, shape = tensor.detach().view(torch.int16).view(-1), tuple(tensor.shape)
        tensors.append(ranks.ToRank(name, "BF16", shape, old, tiles.choose(shape), at[-1].numel()))
    positions = torch.cat(at)
    took = milliseconds(lambda: ranks.rank(tensors, positions), weights.device, ROUNDS)
    host = sum(_on_host(own.old, positions) for own, positions in zip(tensors, at, strict=True))
    what = f"rank, {weights.name}, {positions.numel() / weights.count:.1%}"
    table.row(what, took, copies.digest(weights.count), host)


def _on_host(old: torch.Tensor, positions: torch.Tensor) -> float:
    bits, places = old.cpu().numpy().view("u2"), positions.cpu().numpy()
    started = time.perf_counter()
    twins.fast().classify(bits, places, bits[places], SCHEMES["BF16"])
    return 1e3 * (time.perf_counter() - started)
