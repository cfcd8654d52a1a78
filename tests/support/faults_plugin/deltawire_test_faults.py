"""A vLLM plugin that makes one worker fail where the file named by DELTAWIRE_TEST_FAULT says: `<rank> <step>`.

While the folder named by DELTAWIRE_TEST_JOURNAL holds a file `on`, it also notes the weights before and after each
forward pass, in a file for each rank.
"""

import functools
import os
from pathlib import Path

STEPS = {"init": "_opened", "stage": "_prepare", "commit": "_write", "finish": "_keep"}


def register() -> None:
    from deltawire.live.worker import Replica

    if getattr(Replica, "_faulty", False):
        return
    Replica._faulty = True
    for step, method in STEPS.items():
        setattr(Replica, method, _faulty(step, getattr(Replica, method)))
    Replica.__init__ = _journaled(Replica.__init__)


def _faulty(step, original):
    @functools.wraps(original)
    def wrapped(*arguments):
        wanted = Path(os.environ["DELTAWIRE_TEST_FAULT"])
        if wanted.exists() and wanted.read_text() == f"{_rank()} {step}":
            raise RuntimeError(f"injected into {step}")
        return original(*arguments)

    return wrapped


def _journaled(original):
    @functools.wraps(original)
    def wrapped(replica, model, **options):
        original(replica, model, **options)
        journal = Path(os.environ["DELTAWIRE_TEST_JOURNAL"])

        def note(end, *_):
            if (journal / "on").exists():
                with (journal / str(_rank())).open("a") as file:
                    file.write(f"{hash(str(replica._attached.live.digests())):x}{end}")

        model.register_forward_pre_hook(functools.partial(note, " "))
        model.register_forward_hook(functools.partial(note, "\n"))

    return wrapped


def _rank():
    import torch.distributed as dist

    return dist.get_rank()
