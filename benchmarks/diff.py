"""How fast a capture compares, beside the barest pass that only asks whether anything differs.

One process, one run, the same two arrays of bf16 bits; the best of several rounds, taken in turn. The bound to hold is
0.30 of the bare pass's speed at 1 % changed, on one core.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from compare_pass import count_changed
from deltawire.publish.baseline import Baseline
from deltawire.weights import kernels
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.boxes import Box


def capturing(old: UInts, new: UInts, box: Box | None) -> Callable[[], None]:
    """Compare with a baseline and move it and its digest: from `old` to `new`, and the next time back."""
    baseline = Baseline()
    sides = [Bits("BF16", (data.size,), data) for data in (old, new)]
    baseline.seed("weight", sides[0], box)

    def capture() -> None:
        sides.reverse()
        baseline.advance("weight", baseline.compare("weight", sides[0]))

    return capture


def main(elements: int, shares: list[float], rounds: int) -> None:
    kernels.warm_up()
    rng = np.random.default_rng(0)
    old: UInts = rng.integers(0, 1 << 16, elements, np.uint16)
    print(f"{elements:,} bf16 elements, best of {rounds}; speed of the bare pass `(old != new).any()` = 1.00")
    for share in shares:
        new = old.copy()
        places = rng.choice(elements, int(share * elements), replace=False)
        new[places] += np.uint16(1)
        contenders = {
            "bare numpy": lambda new=new: np.not_equal(old, new).any(),
            "count kernel": lambda new=new: count_changed(old, new),
            "compare_and_collect": lambda new=new: kernels.compare_and_collect(old, new),
            "capture": capturing(old, new, None),
            "capture of a shard": capturing(old, new, Box.within((2 * elements,), (elements,), (elements,))),
        }
        best = dict.fromkeys(contenders, float("inf"))
        for _ in range(rounds):
            for name, run in contenders.items():
                started = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - started)
        bare = best["bare numpy"]
        for name, seconds in best.items():
            gigabytes = 2 * old.nbytes / seconds / 1e9
            print(
                f"{share:7.2%} changed  {name:22} {1e3 * seconds:7.1f} ms  {gigabytes:5.1f} GB/s  {bare / seconds:5.2f}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.001, 0.01, 0.05])
    main(**{"elements": (given := parser.parse_args()).elements, "shares": given.shares, "rounds": given.rounds})
