"""Readers that share the cache of a host: BUCKET PROCESSES. Each reads every version and checks every digest.

With 0 processes it is one reader that stops for ever in the middle of its first delta, once it said "halfway".
"""

import os
import signal
import sys
from pathlib import Path

import deltawire.weights.kernels_numba  # noqa: F401  (once, and not in each child)
from deltawire import Subscriber, digest, open_bucket
from deltawire.buckets.forwarding import Forwarding
from deltawire.read.host_cache import host_cache


class Halfway(Forwarding):
    """A bucket whose download of a delta stands still in the middle."""

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        if "/deltas/" not in key:
            return super().get_file(key, path, limit=limit)
        path.write_bytes(self.get(key, limit=limit)[: limit // 2])
        sys.stdout.write("halfway\n")
        sys.stdout.flush()
        while True:
            signal.pause()


def read(bucket) -> None:
    held = {}
    with Subscriber(bucket, cache=host_cache()) as subscriber:
        for update in subscriber.updates():
            if update.anchor is not None:
                held = {name: bits.copy() for name, bits in update.anchor.items()}
            else:
                update.delta.apply_(held)
            assert digest(held) == update.digests


if __name__ == "__main__":
    url, processes = sys.argv[1], int(sys.argv[2])
    if processes == 0:
        read(Halfway(open_bucket(url)))
    children = []
    for _ in range(processes):
        if (child := os.fork()) == 0:
            read(open_bucket(url))
            os._exit(0)
        children.append(child)
    sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
