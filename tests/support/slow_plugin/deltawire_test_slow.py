"""A vLLM plugin that makes every forward pass take longer while the file named by DELTAWIRE_TEST_SLOW is there.

A tiny model makes tokens faster than the front of vLLM passes them on: it then answers no other call, a pause neither,
before the request is over. Slowed, it has the time that a model of real size leaves it.
"""

import functools
import os
import time
from pathlib import Path

SECONDS = 0.03
"""added to each pass"""


def register() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    if not getattr(Worker, "_slowed", False):
        Worker._slowed = True
        Worker.execute_model = _slowed(Worker.execute_model)


def _slowed(original):
    slow = Path(os.environ["DELTAWIRE_TEST_SLOW"])

    @functools.wraps(original)
    def wrapped(*arguments, **options):
        if slow.exists():
            time.sleep(SECONDS)
        return original(*arguments, **options)

    return wrapped
