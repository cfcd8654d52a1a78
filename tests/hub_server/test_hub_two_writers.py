"""Two trainers on one `hf://` bucket, at once, over the real client: neither overwrites what the other was told of."""

import threading

import pytest
from hub_client import client_environment
from runs import PATIENCE, edit, model

from deltawire import Publisher, open_bucket, verify
from deltawire.errors import ChainError, DeltaWireError
from deltawire.hub_server import HubProcess
from deltawire.runlog.log import list_commits, load_commit

ROUNDS = 5


@pytest.fixture
def bucket(tmp_path):
    with HubProcess(tmp_path / "root", log=tmp_path / "log") as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {**client_environment(tmp_path), "HF_ENDPOINT": hub.url}.items():
            patch.setenv(name, value)
        yield open_bucket("hf://buckets/me/shared", create=True)


class Trainer:
    """Publishes a step of its own in each round, and opens anew once it was told that another holds the run."""

    def __init__(self, bucket, number):
        self.bucket, self.number = bucket, number
        self.weights, self.publisher = model(), Publisher(bucket)
        self.acknowledged, self.told = [], 0

    def step(self, number):
        edit(self.weights, 100 * number + self.number)
        try:
            self.publisher.publish(self.weights)
            self.acknowledged.append(self.publisher.flush(PATIENCE))
        except ChainError:
            self.told += 1
            with pytest.raises(DeltaWireError):
                self.publisher.close(0.1)
            self.publisher = Publisher(self.bucket)

    def close(self):
        try:
            self.publisher.close(PATIENCE)
        except ChainError:
            self.told += 1


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.filterwarnings("ignore:the first publish does not look like a continuation")
def test_of_two_trainers_at_once_no_acknowledged_version_is_overwritten_and_one_is_told(bucket):
    assert not bucket.conditional_writes
    with Publisher(bucket) as first:
        first.publish(model())
    trainers = [Trainer(bucket, number) for number in range(2)]
    for number in range(ROUNDS):
        threads = [threading.Thread(target=trainer.step, args=(number,)) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=4 * PATIENCE)
            assert not thread.is_alive()
    for trainer in trainers:
        trainer.close()
    acknowledged = [position for trainer in trainers for position in trainer.acknowledged]
    (run,) = {position.run for position in acknowledged}
    there = [load_commit(bucket, run, version, key=key).record.position for version, key in list_commits(bucket, run)]
    assert set(acknowledged) <= set(there)
    assert sum(trainer.told for trainer in trainers) > 0
    assert verify(bucket).position in there
