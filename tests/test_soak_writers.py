"""Trainers that take each other's bucket, over and over: what was acknowledged is in the chain, who lost is told.

`make soak` plays more rounds. Clocks jump by a day either way; the weights are synthetic.
"""

import os
import random

import pytest
from runs import PATIENCE, edit, model

from deltawire import Publisher, Subscriber, open_bucket, verify
from deltawire.errors import DeltaWireError, Forked
from deltawire.runlog.log import continues

ROUNDS = 10 if "DELTAWIRE_SOAK_VERSIONS" not in os.environ else int(os.environ["DELTAWIRE_SOAK_VERSIONS"]) // 4
SEED = int(os.environ.get("DELTAWIRE_SOAK_SEED", "1"))
DAY = 86_400.0


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("quick_retries")
@pytest.mark.filterwarnings("ignore:the first publish does not look like a continuation")
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_no_acknowledged_version_is_lost_and_every_trainer_that_lost_the_bucket_is_told(tmp_path, kind):
    draw, url = random.Random(SEED), "memory://soak-writers" if kind == "memory" else (tmp_path / "b").as_uri()
    bucket, acknowledged, told, superseded = open_bucket(url, create=True), [], 0, 0
    weights = [model(), model()]

    def opened():
        nonlocal superseded
        supersede = draw.random() < 0.2
        superseded += supersede
        jump = draw.choice([-DAY, 0.0, DAY])
        return Publisher(bucket, run="supersede" if supersede else "continue", clock=lambda: 1.8e9 + jump)

    trainers = [opened(), None]
    for number in range(ROUNDS * 4):
        who = draw.randrange(2)
        try:
            if trainers[who] is None:
                trainers[who] = opened()
            edit(weights[who], number, share=0.05)
            trainers[who].publish(weights[who])
            acknowledged.append(trainers[who].flush(PATIENCE))
        except Forked:
            told += 1
            with pytest.raises(DeltaWireError):
                trainers[who].close(0.1)
            trainers[who] = None
    for trainer in filter(None, trainers):
        try:
            trainer.close(PATIENCE)
        except Forked:
            told += 1
    with Subscriber(bucket) as subscriber:
        newest, run = subscriber.latest(), subscriber.run.run
        ours = {(position.version, position.root) for position in acknowledged if position.run == run}
        assert ours <= {(commit.version, commit.root) for commit in subscriber.commits()}
    others = {position.run for position in acknowledged} - {run}
    assert all(continues(bucket, run, other) for other in others)  # nobody's run was replaced by one beside it
    assert told > 0
    assert superseded > 0
    assert verify(bucket).position == newest
