"""Asynchronous GRPO on a pretrained chat model that learns small sums: the trainer of `examples.wordle`, another game.

    python -m examples.sums.trainer --model DIR --bucket URL --engine http://127.0.0.1:8000 \\
        --environment http://127.0.0.1:8001 --act learn,2e-5,24 --metrics steps.jsonl

The options are the same. The weights are trained in fp32 and computed on in bf16, on a GPU where torch has one.
"""

import sys

import torch
from examples.sums.chat import Chat
from examples.wordle.learner import Learning
from examples.wordle.trainer import Game, main

SUMS = Game(
    Chat,
    Learning(half=True, rows=12),
    groups=6,
    members=6,
    device="cuda" if torch.cuda.is_available() else "cpu",
)

if __name__ == "__main__":
    sys.exit(main(SUMS))
