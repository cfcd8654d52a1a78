"""A vLLM plugin that makes one worker fail where the file named by DELTAWIRE_TEST_FAULT says: `<rank> <step>`."""

import functools
import os
from pathlib import Path

STEPS = {"init": "_opened", "stage": "_prepare", "commit": "_write", "finish": "confirm"}


def register() -> None:
    from deltawire.vllm.replica import Replica

    if getattr(Replica, "_faulty", False):
        return
    Replica._faulty = True
    for step, method in STEPS.items():
        setattr(Replica, method, _faulty(step, getattr(Replica, method)))


def _faulty(step, original):
    @functools.wraps(original)
    def wrapped(*arguments):
        import torch.distributed as dist

        wanted = Path(os.environ["DELTAWIRE_TEST_FAULT"])
        if wanted.exists() and wanted.read_text() == f"{dist.get_rank()} {step}":
            raise RuntimeError(f"injected into {step}")
        return original(*arguments)

    return wrapped
