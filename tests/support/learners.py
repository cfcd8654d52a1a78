"""A tiny Trainer over random tokens, and a program that trains with it until it is killed: what trainer tests share."""

import os
import signal
import sys
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from deltawire.trainers.transformers import DeltaWeightSyncCallback

torch.set_num_threads(1)
PATIENCE = 90.0
"""seconds"""
VOCABULARY = 40


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """About 10,000 weights, its head tied to its embedding."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True, bos_token_id=1)).to(dtype)


def samples(count: int) -> list[dict[str, list[int]]]:
    """Sequences of eight random tokens, each its own label."""
    rows = torch.randint(0, VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def small_trainer(model, folder, *callbacks, **options) -> Trainer:
    """Two micro-batches make a step; logs every step; nothing saved unless asked for."""
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    data = samples(64)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


class Beginning(DeltaWeightSyncCallback):
    """Waits until the first version is in the bucket."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.publisher.flush(PATIENCE)


class Settling(Beginning):
    """Waits until each version is in the bucket, so that none is folded into the next."""

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.publisher.flush(PATIENCE)


def train_until_killed(folder: str, url: str, step: str) -> None:
    """Train, saving each second step, and die as by `kill -9` when the step is captured, its upload under way."""

    class Die(Beginning):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == int(step):
                os.kill(os.getpid(), signal.SIGKILL)

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    small_trainer(small_model(), folder, Die(url), **options).train()


def train_together(folder: str, url: str) -> None:
    """Train as one of several processes, each with the whole model, and save what was trained."""
    trainer = small_trainer(small_model(), folder, DeltaWeightSyncCallback(url), ddp_backend="gloo")
    trainer.train()
    trainer.save_model(folder)
    torch.distributed.destroy_process_group()  # a thread of gloo that outlives the interpreter aborts the process


def train_until_stopped(folder: str, url: str) -> None:
    """Train, and raise after the first step, before its version was sent."""

    class Stop(DeltaWeightSyncCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            raise RuntimeError("stopped by the test")

    slow = Stop(url, on_upload=lambda report: time.sleep(1))  # so that version 1 is not sent before the exception
    small_trainer(small_model(), folder, slow).train()


if __name__ == "__main__":
    programs = {"killed": train_until_killed, "stopped": train_until_stopped, "together": train_together}
    programs[sys.argv[1]](*sys.argv[2:])
