"""Publishes, and kills the bucket server at a named step: STEP PID-FILE."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import deltawire as dw
from deltawire.errors import DeltaWireError
from deltawire.format.checkpoint import Checkpoint
from deltawire.publish import uploader
from deltawire.runlog import writing
from deltawire.weights.tensors import cast, equal

uploader.FIRST_RETRY = 0.05
step, pid_file = sys.argv[1:]
append, killed = writing.append, []


def die(name):
    if name == step and version == 2 and not killed:
        killed.append(name)
        os.kill(int(Path(pid_file).read_text()), signal.SIGKILL)


writing.append = lambda bucket, attempt: append(bucket, attempt, on_step=die)
bucket = dw.open_bucket("hf://buckets/me/run", create=True)
rng = np.random.default_rng(0)
weights = {name: rng.normal(0, 1, 5000).astype(np.float32) for name in "ab"}
if step == "fetch":
    version = -1
    with dw.Publisher(bucket) as pub:
        for number in range(3):
            weights["a"][: 100 * number] += 1
            pub.publish(weights, step=number)
            pub.flush(60)
    os.kill(int(Path(pid_file).read_text()), signal.SIGKILL)
    killed.append(step)
else:
    with dw.Publisher(bucket) as pub:
        for version in range(4):
            weights["a"][: 100 * version] += 1
            pub.publish(weights, step=version)
            while True:
                try:
                    pub.flush(60)
                    break
                except DeltaWireError as error:
                    print("problem", type(error).__name__, flush=True)
assert killed, "the server was never killed"
while True:
    try:
        report = dw.materialize(bucket, sys.argv[2] + ".out")
        break
    except DeltaWireError as error:
        print("problem", type(error).__name__, flush=True)
        time.sleep(0.1)

assert equal(dict(Checkpoint(report.folder)), {name: cast(value, "BF16") for name, value in weights.items()})
print("equal", report.position.version)
