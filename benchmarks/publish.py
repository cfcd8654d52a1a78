"""How long `publish` keeps a trainer: compare, digest and encode, bf16 weights in host memory, a few shares changed.

python benchmarks/publish.py [--elements 100000000]
"""

import argparse
import statistics
import uuid

import numpy as np

import deltawire as dw
from deltawire.weights.bits import Bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=100_000_000)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.001, 0.01, 0.03])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1 << 16, options.elements // 20, np.uint16) for _ in range(20)]
    weights = {f"layers.{number}.w": Bits("BF16", part.shape, part) for number, part in enumerate(parts)}
    with dw.Publisher(dw.open_bucket(f"memory://{uuid.uuid4()}")) as publisher:
        publisher.publish(weights)
        publisher.flush()
        for share in options.shares:
            reports = []
            for _ in range(options.rounds):
                for part in parts:
                    part[rng.choice(part.size, int(share * part.size), replace=False)] += np.uint16(1)
                reports.append(publisher.publish(weights))
                publisher.flush()
            report = reports[-1]
            seconds = statistics.median(report.seconds for report in reports)
            print(
                f"{share:.1%} of {report.total:,} changed: {seconds:.3f} s, "
                f"{report.model_bytes / seconds / 1e9:.2f} GB/s of weights, "
                f"{report.wire_bytes / report.changed:.2f} bytes a change"
            )


if __name__ == "__main__":
    main()
