"""What bounds the write in the pause on a CPU: our scatter beside one that does not fetch ahead, and a bare copy.

Random 16-bit elements, synthetic, as many as Qwen3-0.6B has, 1 % of them at random places; on one thread and on two.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from deltawire.weights import kernels

REPEATS = 9
LINE = 64
"""bytes of a cache line"""


@numba.njit(nogil=True)
def plain(bits, positions, values):
    for k in range(positions.size):
        bits[positions[k]] = values[k]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=596_049_920)
    parser.add_argument("--changed", type=float, default=0.01, help="share of the elements")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    bits = np.ones(options.elements, np.uint16)
    positions = np.sort(random.integers(0, bits.size, max(1, int(options.changed * bits.size))))
    values = random.integers(0, 65536, positions.size, np.uint16)
    lines = np.unique(positions * bits.itemsize // LINE).size
    copy = np.ones_like(bits)
    print(f"{positions.size:,} of {bits.size:,} elements, in {lines * LINE / bits.nbytes:.1%} of the cache lines")
    copied = milliseconds(lambda: np.copyto(copy, bits))
    print(f"a copy of everything, one thread: {copied:.1f} ms")
    with ThreadPoolExecutor(2) as pool:
        for name, scatter in (("a plain loop", plain), ("fetching ahead", kernels.scatter)):
            for threads in (1, 2):
                parts = [*zip(np.array_split(positions, threads), np.array_split(values, threads), strict=True)]
                took = milliseconds(lambda: list(pool.map(lambda part: scatter(bits, *part), parts)))  # noqa: B023
                rate = (2 * lines * LINE + positions.nbytes + values.nbytes) / took / 1e6
                against = f"{rate:.0f} GB/s, {copied / took:.1f}x shorter than the copy"
                print(f"{name}, {threads} threads: {took:.1f} ms, {against}")


def milliseconds(work: Callable[[], object]) -> float:
    """The median of several runs, after one that compiles and warms up."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
