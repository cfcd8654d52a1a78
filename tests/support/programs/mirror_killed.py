"""Applies a delta to a mirror and is killed at a step: FOLDER STEP."""

import os
import signal
import sys
from pathlib import Path

from mirrors import at, table, versions

from deltawire import Delta
from deltawire.read.mirror import Mirror
from deltawire.weights.delta import TensorDelta

folder, when = Path(sys.argv[1]), sys.argv[2]
chain = versions(3)


def die(step):
    if step == when:
        os.kill(os.getpid(), signal.SIGKILL)


if when.isdecimal():
    seen, apply = [0], TensorDelta.apply_

    def counted(self, bits):
        seen[0] += 1
        if seen[0] > int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return apply(self, bits)

    TensorDelta.apply_ = counted
mirror = Mirror(folder, table(chain[0]), on_step=die)
mirror.apply(Delta.between(dict(mirror.weights), chain[1]), at(chain[1], 1))
