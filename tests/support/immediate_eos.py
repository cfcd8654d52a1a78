"""The real AsyncGRPOTrainer learns to end at once, its weights leaving through a bucket; run by test_trl_trainer.py.

    python immediate_eos.py MODEL ENGINE BUCKET STEPS RESULT

MODEL is a folder of the name by which ENGINE serves it, for that is what TRL asks for. RESULT gets, as JSON, the mean
reward of each step, the last committed position and the digests of the last weights as a server holds them.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from examples.trl import on_cpu
from transformers import AutoTokenizer

import deltawire as dw
from deltawire.trainers.trl import DeltaWeightTransfer

on_cpu.prepare()  # in TRL's child process, too, which imports this file
ENDS = range(30)
"""the tokens that end a completion; so many that a random model of 300 hits one now and then"""
LENGTH = 2
"""tokens"""


def immediate_eos(completion_ids, **_):
    """1 for a completion whose first token ends it, less the later one comes, 0 for none."""
    return [1 - next((n for n, token in enumerate(ids) if token in ENDS), LENGTH) / LENGTH for ids in completion_ids]


class Remembering(DeltaWeightTransfer):
    """Keeps the last position, which is gone when TRL has let go of the transfer."""

    def send_weights(self, iterator):
        super().send_weights(iterator)
        self.sent = self.position


def tokenizer_of(model):
    """One word is one token; a chat is the words of its messages."""
    tokenizer = AutoTokenizer.from_pretrained(model, eos_token="w2")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    closed = {"content": {"close": tokenizer.eos_token, "content": "text"}}
    tokenizer.response_template = {"defaults": {"role": "assistant"}, "start_anchor": "<never>", "fields": closed}
    return tokenizer


def main(model, engine, bucket, steps, result):
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    transfer = Remembering(bucket, poll=0.05, assets=model, timeout=120)
    trainer = AsyncGRPOTrainer(
        model=model,
        reward_funcs=immediate_eos,
        processing_class=tokenizer_of(model),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{n}"}] for n in range(100, 108)]}),
        weight_transfer=transfer,
        args=AsyncGRPOConfig(
            output_dir="trl",
            max_steps=int(steps),
            learning_rate=5e-3,
            per_device_train_batch_size=64,
            num_generations=16,
            max_completion_length=LENGTH,
            max_staleness=2,
            max_inflight_tasks=64,
            queue_maxsize=64,
            vllm_server_base_url=engine,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **on_cpu.OPTIONS,
        ),
    )
    with on_cpu.quick_end(trainer):
        trainer.train()
    weights = {name: parameter.detach().bfloat16() for name, parameter in trainer.model.named_parameters()}
    told = {
        "rewards": [record["reward"] for record in trainer.state.log_history if "reward" in record],
        "logged": [record["deltawire/version"] for record in trainer.state.log_history if "reward" in record],
        "lags": [record.get("deltawire/policy_lag") for record in trainer.state.log_history if "reward" in record],
        "oldest": [record.get("deltawire/policy_oldest") for record in trainer.state.log_history if "reward" in record],
        "position": str(transfer.sent),
        "digests": {name: f"{value:016x}" for name, value in dw.digest(weights).items()},
    }
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
