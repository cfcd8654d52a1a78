"""A vLLM plugin that makes one worker fail where the file named by DELTAWIRE_TEST_FAULT says: `<rank> <moment>`.

While the folder named by DELTAWIRE_TEST_JOURNAL holds a file `on`, it also notes the weights before and after each
forward pass, in a file for each rank.
"""

import functools
import os
from pathlib import Path


def register() -> None:
    from deltawire.live.worker import LiveWorker

    LiveWorker.before = before


def before(worker, moment):
    """In place of `LiveWorker.before`."""
    import torch.distributed as dist

    rank = dist.get_rank()
    if moment == "attach":
        watch(worker, rank)
    wanted = Path(os.environ["DELTAWIRE_TEST_FAULT"])
    if wanted.exists() and wanted.read_text() == f"{rank} {moment}":
        raise RuntimeError(f"injected into {moment}")


@functools.cache
def watch(worker, rank):
    """Note a worker's weights around each forward pass, from when it is attached for the first time."""
    journal = Path(os.environ["DELTAWIRE_TEST_JOURNAL"])

    def note(end, *_):
        if (journal / "on").exists():
            with (journal / str(rank)).open("a") as file:
                file.write(f"{hash(str(worker.live.require_attached().live.digests())):x}{end}")

    worker.model.register_forward_pre_hook(functools.partial(note, " "))
    worker.model.register_forward_hook(functools.partial(note, "\n"))
