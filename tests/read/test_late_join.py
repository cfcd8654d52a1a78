"""What 64 versions behind costs, on a synthetic chain made like a recorded one: Adam at 1e-6 under bf16.

`pytest tests/read/test_late_join.py --log-cli-level=INFO` prints bytes and objects.
"""

import logging

import numpy as np
import pytest
from runs import fresh, publishing, served

from deltawire import Subscriber, digest
from deltawire.buckets import Counting
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.digest import root

log = logging.getLogger(__name__)
VERSIONS, ELEMENTS, RATE = 130, 400_000, 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """130 steps of Adam with noisy gradients on weights of the usual size, each a commit; compacted."""
    draw, bucket = np.random.default_rng(0), fresh()
    weights = {"w": draw.normal(0, 0.02, (ELEMENTS // 100, 100)).astype(np.float32)}
    drift = draw.normal(0, 0.1, weights["w"].shape)
    first, second, kept = np.zeros_like(drift), np.zeros_like(drift), []
    with publishing(bucket) as publisher:
        for step in range(1, VERSIONS + 1):
            gradient = drift + draw.normal(0, 1, drift.shape)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            move = RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            weights["w"] = (weights["w"] - move).astype(np.float32)
            publisher.publish(weights)
            publisher.flush(30)
            kept.append(served(weights))
    with Compactor(bucket, tmp_path_factory.mktemp("compactor") / "m", anchors="never") as compactor:
        compactor.step()
    return bucket, kept


@pytest.mark.parametrize(("start", "most"), [(0, 4), (64, 4), *((start, 10) for start in (1, 21, 33, 42, 63))])
def test_sixty_four_behind_fetches_few_objects_and_at_most_45_percent_of_the_bytes(run, start, most):
    bucket, kept = run
    counting = Counting(bucket)
    with Subscriber(counting) as subscriber:
        here = subscriber.chain.commit(start).record.position
        deltas = [subscriber.chain.commit(version).record.wire_bytes for version in range(start + 1, start + 65)]
        change = subscriber.change(here, start + 64)
    share = change.wire_bytes / sum(deltas)
    log.info("%d to %d: %d payloads, %d records, %d B of %d, %.1f %%", start, start + 64, change.payloads,
             change.records, change.wire_bytes, sum(deltas), 100 * share)  # fmt: skip
    arrived = dict(kept[start]) + change.delta
    assert root(subscriber.run.table, digest(arrived)) == change.position.root
    assert change.payloads <= most
    assert share <= 0.45
