"""TRL trains, vLLM answers, and between them is a bucket: deltawire is the import and one argument.

VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen3-0.6B --host 127.0.0.1 --weight-transfer-config '{"backend":"deltawire"}'
deltawire follow --bucket file:///tmp/minimal
python examples/minimal.py Qwen/Qwen3-0.6B file:///tmp/minimal
"""

import sys

from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from deltawire.trainers.trl import DeltaWeightTransfer


def brief(completion_ids, **_):
    """The shorter an answer, the better."""
    return [1 / (1 + len(ids)) for ids in completion_ids]


def main(model: str, bucket: str, engine: str = "http://127.0.0.1:8000", steps: int = 20) -> None:
    questions = [[{"role": "user", "content": f"What is {n} times {n}?"}] for n in range(100)]
    trainer = AsyncGRPOTrainer(
        model=model,
        reward_funcs=brief,
        train_dataset=Dataset.from_dict({"prompt": questions}),
        weight_transfer=DeltaWeightTransfer(bucket),
        args=AsyncGRPOConfig(
            output_dir="runs/minimal", max_steps=int(steps), vllm_server_base_url=engine, report_to=[]
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
