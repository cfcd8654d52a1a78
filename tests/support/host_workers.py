"""Tensor-parallel workers of one host, each a process of its own: what they fetch together, and take each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from programs import program
from small_s3 import small_s3

import deltawire as dw
from deltawire.buckets.objects import ONE_REQUEST
from deltawire.weights.bits import Bits

LONG = 300
"""seconds for all processes"""
SHAPE = (2048, 2048)
"""of each tensor"""
VERSIONS = ("join", "1 % of all weights", "all weights")


def publish(url, tensors):
    """Version 1 changes one weight in a hundred, and version 2 all of them."""
    rng = np.random.default_rng(0)
    weights = {f"layer.{n}": rng.integers(0, 1 << 15, SHAPE[0] * SHAPE[1], np.uint16) for n in range(tensors)}
    with dw.Publisher(dw.open_bucket(url)) as publisher:
        for share in (0.01, 1.0, 0.0):
            publisher.publish({name: Bits("BF16", SHAPE, value.copy()) for name, value in weights.items()})
            publisher.flush(LONG)
            for value in weights.values():
                value[rng.random(value.size) < share] += np.uint16(1)


def follow(url, ranks, size, cache):
    """What each of these workers says of each version."""
    command = [sys.executable, program("follow_slices"), url]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environ = {**os.environ, "DELTAWIRE_CACHE": str(cache), "PYTHONPATH": path}
    started = [
        subprocess.Popen([*command, str(rank), str(size)], stdout=subprocess.PIPE, env=environ, text=True)
        for rank in ranks
    ]
    said = []
    for process in started:
        out, _ = process.communicate(timeout=LONG)
        assert process.returncode == 0
        said.append([json.loads(line) for line in out.splitlines()])
    return said


def measure(tensors, ranks, size, cache):
    """Bytes of payloads that the store sent by what there are; what each worker says of each version; and the digests
    promised of each."""
    with small_s3() as store:
        publish("s3://weights/run", tensors)
        before = len(store.asked)
        said = follow("s3://weights/run", ranks, size, cache)
        sizes = {key: len(data) for key, data in store.objects.items() if key.endswith(".safetensors")}
        gets = [one for one in store.asked[before:] if one.method == "GET" and one.key in sizes]
        sent = sum(_sent(one, sizes[one.key]) for one in gets)
        with dw.Subscriber(dw.open_bucket("s3://weights/run")) as subscriber:
            promised = [subscriber.digests_at(version) for version in range(3)]
        return sent / sum(sizes.values()), said, promised


def _sent(asked, size):
    """Bytes of an object that an answer has. A large one is fetched in pieces, and asked for whole once before: that is
    hung up when its size has come."""
    if found := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", "")):
        return min(int(found[2]) + 1, size) - int(found[1])
    return size if size <= ONE_REQUEST else 0
