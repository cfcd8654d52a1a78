"""Everything at once: faults on every store, followers that are killed, compaction and pruning under way.

`make soak` plays a thousand versions; a short form runs with the tests. The followers are processes that keep a mirror:
what a replica does, without a GPU or vLLM. The weights are synthetic.
"""

import logging
import os
import random
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
from programs import program
from runs import commits, edit, model, served

from deltawire import Publisher, Subscriber, open_bucket
from deltawire.buckets.faulty import Faulty, seeded
from deltawire.errors import DeltaWireError
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.mirror import Mirror, held
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import equal

VERSIONS = int(os.environ.get("DELTAWIRE_SOAK_VERSIONS", "60"))
SEED = int(os.environ.get("DELTAWIRE_SOAK_SEED", "1"))
PATIENCE = 120.0
"""seconds after which what faults interrupt should have been done"""
FAULTS = 0.05
"""share of calls on which something goes wrong"""


def follower(url, folder, number, life):
    """A process that keeps a mirror of the bucket; slower ones have higher numbers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [url, folder / f"m{number}", folder / f"log{number}", str(97 * life + number), str(0.02 * 5**number)]
    command = [sys.executable, program("soak_follower"), *arguments, f"f{number}"]
    with open(folder / f"errors{number}", "ab") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors)


def rot(folder):
    """Flip one bit of the weights in a mirror, as a disk may; how many were flipped."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte ^ 4]))
        return 1
    return 0


def insist(action):
    """Repeat what faults interrupt, as a supervisor would."""
    refused, deadline = Counter(), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return action()
        except DeltaWireError as error:
            refused[f"{type(error).__name__}: {error}"] += 1
    raise AssertionError(f"never done: {refused.most_common(5)}")


@pytest.mark.timeout(300 if VERSIONS <= 60 else 1200)
@pytest.mark.usefixtures("quick_retries")
def test_all_followers_end_where_the_trainer_does_whatever_happened(tmp_path):
    draw, weights, injected = random.Random(SEED), model(), Counter()
    (tmp_path / "bucket").mkdir()
    url = (tmp_path / "bucket").as_uri()
    clean = open_bucket(url)
    faulty = Faulty(clean, seeded(SEED, FAULTS))
    uploads, kills, sizes, reopened = [], [], [], []
    followers = [follower(url, tmp_path, number, 0) for number in range(3)]
    trainer = insist(lambda: Publisher(faulty, on_upload=uploads.append))
    compactor = Compactor(faulty, tmp_path / "compactor", anchors=32)
    started = time.monotonic()
    try:
        for version in range(VERSIONS):
            edit(weights, version, share=0.02)
            trainer.publish(weights, step=version)
            if draw.random() < 0.5:
                insist(partial(trainer.flush, 30))
            if draw.random() < 0.05:
                injected += Counter({"trainer restart": 1})
                insist(partial(trainer.close, 30))
                began = time.monotonic()
                trainer = insist(lambda: Publisher(faulty, on_upload=uploads.append))
                reopened.append(time.monotonic() - began)
            if draw.random() < 0.08:
                number = draw.randrange(3)
                followers[number].kill()
                followers[number].wait()
                kills.append((number, time.time()))
                followers[number] = follower(url, tmp_path, number, len(kills))
            if version % 16 == 15:
                compactor.close()
                if draw.random() < 0.3:
                    injected += Counter({"rot in the mirror": rot(tmp_path / "compactor")})
                compactor = Compactor(faulty, tmp_path / "compactor", anchors=32)
                insist(compactor.step)
                with Subscriber(clean) as subscriber:
                    run = subscriber.run.run
                pruned = retention.find_prunable(clean, run, retention.Policy(2, -1.0, replica_hours=0.01))
                insist(partial(retention.carry_out, faulty, pruned))
                sizes.append(sum(stat.size for stat in clean.list("runs/")))
        position = insist(partial(trainer.flush, 30))
        deadline = time.monotonic() + PATIENCE
        while any(held(tmp_path / f"m{number}") != position for number in range(3)):
            assert time.monotonic() < deadline, [held(tmp_path / f"m{number}") for number in range(3)]
            assert [process.poll() for process in followers] == [None] * 3
            time.sleep(0.05)
    finally:
        for process in followers:
            process.kill()
            process.wait()
        compactor.close()
        insist(partial(trainer.close, 30))
    for number in range(3):
        with Mirror(tmp_path / f"m{number}", compactor._subscriber.run.table) as mirror:
            assert equal({name: Checkpoint(mirror.folder)[name] for name in weights}, served(weights))
    assert commits(clean)[-1].step == VERSIONS - 1  # the last one captured
    committed = {upload.position.version: upload.position.root for upload in uploads}
    parents = [upload.parent for upload in uploads]
    assert parents == [None, *[upload.position.version for upload in uploads][:-1]]  # each change in exactly one commit
    for number in range(3):
        for line in (tmp_path / f"log{number}").read_text().splitlines():
            version, root, *_ = line.split()
            assert committed[int(version)] == root
        assert (tmp_path / f"errors{number}").read_text() == ""
    model_bytes = sum(bits.data.nbytes for bits in served(weights).values())
    assert max(sizes[len(sizes) // 2 :]) <= 2 * max(sizes[: len(sizes) // 2 + 1]) + 10 * model_bytes
    injected += faulty.injected
    lives = {
        number: [float(line.split()[-1]) for line in (tmp_path / f"log{number}").read_text().splitlines()]
        for number in range(3)
    }
    back = [
        min(when for when in lives[number] if when > killed) - killed
        for number, killed in kills
        if lives[number][-1] > killed
    ]
    logging.getLogger(__name__).info(
        "%d versions in %.0f s, %d commits, faults %s, %d kills, bucket %s bytes of at most %s; a killed follower "
        "served again after at most %.1f s, a restarted trainer had its baseline after at most %.2f s",
        VERSIONS, time.monotonic() - started, len(uploads), dict(injected), len(kills), sizes[-1:], max(sizes),
        max(back, default=0.0), max(reopened, default=0.0),
    )  # fmt: skip
