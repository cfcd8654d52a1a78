"""What TRL's AsyncGRPOTrainer needs to run without a GPU. Not for use with one: it patches private names of TRL 1.16.

on_cpu.prepare()  # before anything of trl is imported, in the main module, so that TRL's child process does it too
...
with on_cpu.quick_end(trainer):
    trainer.train()
"""

import importlib.metadata
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

WRITTEN_FOR = "1.16."
OPTIONS = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "token_budget": 0}
"""what AsyncGRPOConfig takes for granted on a GPU"""


def prepare() -> None:
    """Patch TRL. Raises RuntimeError for another TRL than these patches were written for."""
    found = importlib.metadata.version("trl")
    if not found.startswith(WRITTEN_FOR):
        raise RuntimeError(f"trl {found} is installed; these patches are for {WRITTEN_FOR}*: pip install 'trl==1.16.0'")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    sys.modules["vllm"] = None  # a trainer's host needs none; TRL would import all of it
    import trl.experimental.async_grpo.async_grpo_trainer as trainer
    import trl.experimental.async_grpo.async_rollout_worker as worker
    import trl.experimental.async_grpo.packing as packing

    trainer.get_peak_flops_per_device = lambda *_: None  # asks CUDA for the device's name
    worker.is_vllm_available = lambda: True  # the worker speaks HTTP alone, and refuses to start without vllm
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)  # is a CUDA kernel on the Hub
    torch.set_num_threads(1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    *lengths: Any,
    softmax_scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention within each of several packed sequences: flash_attn_varlen_func in plain torch.

    `query` is [tokens, heads, width], `key` and `value` have a divisor of as many heads; `query_ends` and `key_ends`
    are where sequences begin and end. Queries stand at the end of their sequence's keys.
    """
    outputs = []
    for (begin, end), (first, last) in zip(query_ends.unfold(0, 2, 1), key_ends.unfold(0, 2, 1), strict=True):
        q, k, v = (part.transpose(0, 1) for part in (query[begin:end], key[first:last], value[first:last]))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@contextmanager
def quick_end(trainer: Any) -> Iterator[None]:
    """Let the rollout worker's child end at once when training does.

    A process does not exit before what it put into a queue is read, and TRL reads no more by then: it would wait 15 s
    for the child and terminate it. Here a thread empties the two queues, which are public, meanwhile.
    """
    ended, stopped = threading.Event(), threading.Event()
    queues = (trainer.rollout_worker.rollout_buffer, trainer.rollout_worker.metrics_queue)

    def drain() -> None:
        ended.wait()
        while not stopped.wait(0.01):
            for each in queues:
                with suppress(queue.Empty):
                    while True:
                        each.get_nowait()

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            ended.set()

    trainer.add_callback(AtTheEnd())
    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        ended.set()
        thread.join()
