"""A run that publishes, compacts, mirrors and prunes, and kills itself: `killed_run.py URL FOLDER STEP OCCURRENCE`.

It dies by SIGKILL at the OCCURRENCE-th time that STEP is done, as "publish commit" or "prune batch". Called again it
goes on from where it was. For test_crash_matrix.py.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from runs import edit, model

from deltawire import Publisher, Subscriber, open_bucket
from deltawire.read import mirror
from deltawire.runlog import writing
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor

VERSIONS = 9


class Killer:
    """Kills this process at the `occurrence`-th time that `step` is done."""

    def __init__(self, step, occurrence):
        self.step, self.left = step, occurrence

    def done(self, part, name):
        if f"{part} {name}" == self.step:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def listen(killer):
    """Have the killer hear of what publishing and mirroring do, which no option of theirs does."""
    append = writing.append
    writing.append = lambda bucket, attempt: append(bucket, attempt, on_step=partial(killer.done, "publish"))
    for function in (mirror.Mirror.__init__, mirror.Mirror.create.__func__):
        function.__kwdefaults__["on_step"] = partial(killer.done, "mirror")
    retention.BATCH = 3


def play(bucket, folder, killer):
    with (
        Publisher(bucket) as publisher,
        Compactor(bucket, folder, anchors=4, on_step=partial(killer.done, "compact")) as compactor,
    ):
        done = publisher.position.version if publisher.position else -1
        weights = model()
        for version in range(VERSIONS):
            edit(weights, version)
            if version <= done:
                continue
            publisher.publish(weights, step=version)
            publisher.flush(30)
            if version in (4, 8):
                compactor.step()
        compactor.step()
        with Subscriber(bucket) as subscriber:
            pruned = retention.find_prunable(bucket, subscriber.run.run, retention.Policy(1, -1.0))
        retention.carry_out(bucket, pruned, on_step=lambda key: killer.done("prune", "batch"))


if __name__ == "__main__":
    url, folder, step, occurrence = sys.argv[1:]
    killer = Killer(step, int(occurrence))
    listen(killer)
    play(open_bucket(url, create=True), Path(folder), killer)
