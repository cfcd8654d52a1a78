"""Worker methods that update weights in vLLM's own ways, timed inside the worker: for benchmarks/vllm_pause.py."""

import time

import torch


def register() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    Worker.bench_patches = bench_patches
    Worker.bench_reload = bench_reload


def bench_patches(worker, path: str) -> float:
    """vLLM's sparse loader (`load_checkpoint_weight_patches`) over `<name>.at` and `<name>.to` in a safetensors file;
    seconds, reading the file left out."""
    from safetensors import safe_open
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    patches = []
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(map(int, shape.split(","))) for name, shape in file.metadata().items()}
        for name, shape in shapes.items():
            values, indices = file.get_tensor(f"{name}.to"), file.get_tensor(f"{name}.at")
            patches.append(CheckpointWeightPatch(name, shape, values.dtype, values, indices))
    started = time.perf_counter()
    with torch.no_grad():
        load_checkpoint_weight_patches(worker.model_runner.get_model(), patches)
    return time.perf_counter() - started


def bench_reload(worker, path: str, in_memory: bool) -> float:
    """vLLM's layerwise reload of a whole checkpoint, from its folder or from tensors already in memory; seconds."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config

    tensors = load_file(f"{path}/model.safetensors") if in_memory else None
    started = time.perf_counter()
    with set_current_vllm_config(worker.vllm_config):
        if tensors is None:
            worker.model_runner.reload_weights(weights_path=path)
        else:
            worker.model_runner.reload_weights(weights_iterator=iter(tensors.items()))
    return time.perf_counter() - started
