"""The servers and loads of tests/gpu: which model, how vLLM runs it, how much is asked of it."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from follow_scenario import Load
from random_models import load_weights, quantise, save_random
from servers import EAGER, Server

from deltawire.prepare.fp8 import Fp8

SIZES = '"cudagraph_capture_sizes":[1,2,4,8,16,32]'
GRAPHS = ("--compilation-config", f'{{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY",{SIZES}}}')
"""CUDA graphs of whole decode steps, without torch.compile"""
MIXED = ("--compilation-config", f'{{"mode":0,"cudagraph_mode":"FULL",{SIZES}}}')
"""graphs of whole steps, of batches too that prefill beside decoding"""
PIECES = ("--compilation-config", f'{{"mode":3,"cudagraph_mode":"PIECEWISE",{SIZES}}}')
"""torch.compile, and graphs of what lies between attention layers, for every batch"""
DEFAULT = ("--compilation-config", f"{{{SIZES}}}")
"""vLLM's own default, torch.compile with both kinds of graphs; of fewer sizes, to start sooner"""
SHARED = ("--kv-cache-memory-bytes", "4000000000", "--gpu-memory-utilization", "0.15")
"""of one GPU, on which several servers stand at a time"""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A server and what is asked of it."""

    shape: str
    mode: tuple[str, ...]
    load: Load
    fp8: bool = False


USUAL = {
    "graphs": Scenario("0.6b", GRAPHS, Load(streams=16)),
    "moe": Scenario("moe", GRAPHS, Load(streams=8)),
    "compile": Scenario("tiny", DEFAULT, Load(streams=4)),
    "eager": Scenario("tiny", EAGER, Load(streams=4)),
}
"""what `make test-gpu` runs"""
BY_NAME = {
    "fp8": Scenario("0.6b", GRAPHS, Load(streams=8), fp8=True),
    "mixed": Scenario("0.6b", MIXED, Load(streams=16)),
    "pieces": Scenario("0.6b", PIECES, Load(streams=16)),
    "8b": Scenario("8b", GRAPHS, Load(streams=16)),
    "moe-gaps": Scenario("moe", GRAPHS, Load(streams=8, updates=30, cadence=0, window=10)),
}
"""what it runs where SCENARIOS names it; "moe-gaps" looks for a gap of a second that was seen once"""
LORA = "lora"
"""an adapter run (`test_adapters_on_cuda`)"""


def named() -> set[str]:
    """The scenarios that DELTAWIRE_TEST_GPU names ("all" names all), or the usual ones. "lora" is one of its own."""
    every = {*USUAL, *BY_NAME, LORA}
    names = set(os.environ.get("DELTAWIRE_TEST_GPU", "").replace(",", " ").split()) or {*USUAL}
    if unknown := names - every - {"all"}:
        raise ValueError(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(sorted(every))}")
    return every if "all" in names else names


def chosen() -> dict[str, Scenario]:
    """The scenarios to run in which weights are patched."""
    return {name: one for name, one in {**USUAL, **BY_NAME}.items() if name in named()}


@dataclass(frozen=True, slots=True)
class Model:
    """A random checkpoint, and the trainer's side of it."""

    folder: Path
    masters: dict[str, torch.Tensor]
    prepare: tuple[Any, ...]


def make_model(scenario: Scenario, folder: Path, device: str) -> Model:
    """Write the scenario's checkpoint; its masters are the weights before they were quantised."""
    save_random(folder, scenario.shape, device)
    masters = load_weights(folder)
    prepare = (Fp8(),) if scenario.fp8 else ()
    for fp8 in prepare:
        quantise(folder, fp8, masters)
    return Model(folder, masters, prepare)


def launch(mode: tuple[str, ...], model: Path, log: Path, device: str, **options: Any) -> Server:
    """Start a server; `wait` on it. DELTAWIRE_TEST_GPU_OPTIONS are further options of vLLM's. On a CPU it runs as
    vLLM's CPU build does, whatever `mode` says."""
    further = tuple(options.pop("options", ()))
    if device == "cpu":
        return Server(model, log, options=further, **options)
    further += (*SHARED, *shlex.split(os.environ.get("DELTAWIRE_TEST_GPU_OPTIONS", "")))
    return Server(model, log, mode=mode, options=further, **options)
