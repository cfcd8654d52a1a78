"""TRL plays Wordle: AsyncGRPOTrainer, games from an OpenEnv server, and weights that leave through a bucket.

    python -m examples.wordle.environment --port 8001
    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --weight-transfer-config '{"backend": "deltawire"}' \\
        --middleware deltawire.vllm.middleware.PolicyVersion
    deltawire follow --bucket hf://buckets/me/wordle --engine http://127.0.0.1:8000
    python -m examples.trl.wordle_trl --model MODEL --bucket hf://buckets/me/wordle \\
        --engine http://127.0.0.1:8000 --environment http://127.0.0.1:8001

The four may run on four hosts. MODEL is what vLLM serves it as: a Hub repository, or a folder of that name. The policy
plays by calling the tool `guess`, a turn for each call, and is rewarded by the game.

Without a GPU it trains the toy of `examples.wordle.model`, whose tokenizer knows letters alone: `teach_to_chat` gives
it a chat template in which a line is a call of the tool, so that TRL's own way through tools and turns is what runs.
`make example-trl` starts and stops all the parts for that. With a chat model of the Hub, its own template is used.
"""

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    from examples.trl import on_cpu

    on_cpu.prepare()

from datasets import Dataset
from examples.trl.game import TASK, Wordle, teach_to_chat
from examples.wordle.game import Rules
from examples.wordle.trainer import served_digests
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from deltawire.trainers.trl import DeltaWeightTransfer

TOLD = {
    "reward": "reward",
    "turns": "rollout/turns_mean",
    "staleness": "sample/staleness_mean",
    "policy_lag": "deltawire/policy_lag",
    "sync_seconds": "perf/weight_sync_s",
}
"""what is told of a step, and TRL's name for it"""


class Tell(TrainerCallback):
    """Prints a JSON line for each step."""

    def __init__(self, transfer: DeltaWeightTransfer) -> None:
        self._transfer = transfer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "reward" not in logs or self._transfer.last is None:
            return
        told = {name: logs.get(key) for name, key in TOLD.items()}
        published = {"version": self._transfer.last.version, "delta_bytes": self._transfer.last.wire_bytes}
        published["policy"] = str(self._transfer.policies[-1])
        print(json.dumps({"event": "step", "step": state.global_step, **told, **published}), flush=True)


def configure(arguments: argparse.Namespace, rules: Rules, *, turn: int) -> AsyncGRPOConfig:
    """TRL's options; a turn is at most `turn` tokens long. The line after the last guess of a game is not played."""
    return AsyncGRPOConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch,
        num_generations=8,
        max_inflight_tasks=arguments.batch,
        queue_maxsize=arguments.batch,
        max_staleness=2,
        max_tool_calling_iterations=rules.guesses,
        max_completion_length=turn,
        vllm_server_base_url=arguments.engine,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **({} if torch.cuda.is_available() else on_cpu.OPTIONS),
    )


def train(arguments: argparse.Namespace) -> AsyncGRPOTrainer:
    """Train to the end; the trainer, which holds the last weights."""
    rules = Rules()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if toy := tokenizer.chat_template is None:
        teach_to_chat(tokenizer)
    ask = [{"role": "user", "content": TASK}]
    # The two lines that bring deltawire to TRL: this one, and `weight_transfer=` below.
    transfer = DeltaWeightTransfer(arguments.bucket, [arguments.engine], assets=arguments.assets)
    trainer = AsyncGRPOTrainer(
        model=arguments.model,
        weight_transfer=transfer,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": ask, "seed": seed} for seed in range(rules.secrets)]),
        environment_factory=partial(Wordle, arguments.environment),
        callbacks=[Tell(transfer)],
        args=configure(arguments, rules, turn=rules.length + 2 if toy else 512),
    )
    with nullcontext() if torch.cuda.is_available() else on_cpu.quick_end(trainer):
        trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what vLLM serves it as: a Hub repository or a folder")
    parser.add_argument("--bucket", required=True, help="where to publish: hf://buckets/…, file:///…, s3://…")
    parser.add_argument("--engine", default="http://127.0.0.1:8000", help="URL of the vLLM server")
    parser.add_argument("--environment", default="http://127.0.0.1:8001", help="URL of the environment server")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="games in a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--assets", type=Path, help="a folder with config and tokenizer files to put into the bucket")
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--digests", type=Path, help="where to write the digests of the last weights")
    arguments = parser.parse_args()
    trainer = train(arguments)
    if arguments.digests is not None:
        arguments.digests.write_text(json.dumps(served_digests(trainer.model), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
