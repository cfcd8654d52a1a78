"""What a publish and an apply of a 100 M model cost with Numba and in numpy, in a folder on this machine.

    python benchmarks/without_numba.py [--elements 100000000] [--changed 0.01]

Each way runs in a process of its own, and prints one line: seconds of the best of three, and the peak of its memory.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np


def measure(elements: int, share: float) -> dict[str, float]:
    """Seconds of each verb, the best of three versions."""
    import deltawire as dw
    from deltawire.weights import kernels

    kernels.warm_up()
    random = np.random.default_rng(0)
    weights = {f"layer{k}": np.zeros(elements // 10, np.float16) for k in range(10)}
    seconds: dict[str, list[float]] = {"publish": [], "apply": [], "digest": []}
    with tempfile.TemporaryDirectory() as folder:
        bucket = dw.open_bucket(Path(folder).as_uri())
        with dw.Publisher(bucket) as publisher:
            publisher.publish(weights, step=0)
            publisher.flush(600)
            copy = {name: value.copy() for name, value in weights.items()}
            with dw.Subscriber(bucket) as subscriber:
                position = subscriber.position_at(0)
                for step in range(1, 4):
                    for value in weights.values():
                        bits = value.view(np.uint16)
                        bits[random.integers(0, bits.size, int(bits.size * share))] += np.uint16(1)
                    started = time.perf_counter()
                    publisher.publish(weights, step=step)
                    publisher.flush(600)
                    seconds["publish"].append(time.perf_counter() - started)
                    started = time.perf_counter()
                    (update,) = subscriber.updates(since=position)
                    assert update.delta is not None
                    update.delta.apply_(copy)
                    seconds["apply"].append(time.perf_counter() - started)
                    position = update.position
                    started = time.perf_counter()
                    assert dw.digest(copy) == dict(update.digests)
                    seconds["digest"].append(time.perf_counter() - started)
    return {verb: min(taken) for verb, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--changed", type=float, default=0.01, help="share of elements that change in each version")
    parser.add_argument("--way", choices=("numba", "numpy"))
    options = parser.parse_args()
    if options.way is None:
        for way in ("numba", "numpy"):
            subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)
        return
    if options.way == "numpy":
        sys.modules["numba"] = None  # type: ignore[assignment]
        warnings.simplefilter("ignore", RuntimeWarning)
    taken = measure(options.elements, options.changed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(options.way, *(f"{verb} {seconds:.2f} s" for verb, seconds in taken.items()), f"peak {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
