"""Two trainers on one bucket, and writes that arrive long after their trainer died: told apart, and nothing is lost."""

import msgspec
import pytest
from runs import PATIENCE, commits, edit, fresh, model, publishing, read_weights, served

from deltawire import Publisher, Subscriber
from deltawire.buckets.faulty import Faulty
from deltawire.errors import AccessRefused, AlreadyExists, DeltaWireError, Forked, NotFound
from deltawire.format.checkpoint import files
from deltawire.read.mirror import Mirror
from deltawire.runlog import log, writing
from deltawire.runlog.keys import HEAD_KEY, commit_key
from deltawire.runlog.records import Head, write
from deltawire.runlog.writing import Attempt
from deltawire.weights.tensors import equal


class Plain(Faulty):
    """A store that cannot refuse a second write, as the Hub; it can hold writes back and let them arrive late."""

    def __init__(self, bucket):
        super().__init__(bucket, lambda call: None)
        self.conditional_writes = False
        self.held, self.hold = [], None

    def put(self, key, data):
        if self.hold is not None and self.hold in key:
            self.held.append((key, data))  # on its way for ever; the trainer dies before it hears
            raise AccessRefused("no answer")
        super().put(key, data)

    def put_new(self, key, data):
        try:
            self.stat(key)
        except NotFound:
            self.put(key, data)
        else:
            raise AlreadyExists(key)

    def arrive(self):
        self.hold = None
        for key, data in self.held:
            self._bucket.put(key, data)


@pytest.mark.parametrize("plain", [False, True], ids=["conditional writes", "plain writes"])
def test_of_two_trainers_the_second_to_write_is_told_who_holds_the_run(plain):
    bucket = Plain(fresh()) if plain else fresh()
    weights, other = model(), model()
    with publishing(bucket) as first:
        first.publish(weights)
        first.flush(PATIENCE)
        told = pytest.raises(Forked, match=r"written by someone else \(.* pid \d+\): two trainers")
        with told, publishing(bucket) as second:
            edit(weights, 1)
            first.publish(weights)
            first.flush(PATIENCE)
            edit(other, 2)
            second.publish(other)
        edit(weights, 3)
        first.publish(weights)
        first.flush(PATIENCE)
    assert equal(read_weights(bucket), served(weights))
    assert [commit.version for commit in commits(bucket)] == [0, 1, 2]


def test_where_nothing_can_be_refused_two_commits_of_one_version_stand_side_by_side_and_both_writers_are_told():
    bucket, weights = Plain(fresh()), model()
    told = pytest.raises(Forked, match=r"was written by someone else \(elsewhere pid 7\): two trainers")
    with told, publishing(bucket) as publisher:
        publisher.publish(weights)
        publisher.flush(PATIENCE)
        edit(weights, 1)
        publisher.publish(weights)
        publisher.flush(PATIENCE)
        (first, mine) = commits(bucket)
        run = log.read_run(bucket, mine.run)
        other = Attempt(run, msgspec.structs.replace(mine, writer="elsewhere pid 7"), {})
        with pytest.raises(Forked, match=r"two trainers publish one run"):
            writing.append(bucket, other)  # the second is told at its own publish
        assert [version for version, _ in log.list_commits(bucket, mine.run)] == [0, 1]
        key = other.key_in(bucket)
        bucket.put(key, write(other.commit))  # unless both look before either writes: HEAD then says who was last
        bucket.put(HEAD_KEY, write(Head(mine.run, 1, key)))
        assert commits(bucket) == [first, other.commit]
        edit(weights, 2)
        publisher.publish(weights)  # and the first at its next
    with publishing(bucket) as again:  # a supervisor starts it anew: the difference is published, nothing is lost
        again.publish(weights)
        again.flush(PATIENCE)
    assert equal(read_weights(bucket), served(weights))


def test_a_commit_that_arrives_long_after_its_trainer_died_takes_nobodys_place(tmp_path):
    """On a store without conditional writes, where another commit of that number stands by then."""
    bucket, weights = Plain(fresh()), model()
    dying = Publisher(bucket)
    dying.publish(weights)
    dying.flush(PATIENCE)
    bucket.hold = "commits/000001"
    edit(weights, 1)
    dying.publish(weights)
    with pytest.raises(DeltaWireError, match="no answer"):
        dying.close(PATIENCE)
    bucket.hold = None
    edit(weights, 2)
    with publishing(bucket) as restarted:
        restarted.publish(weights)
        restarted.flush(PATIENCE)
        with Subscriber(bucket) as subscriber:
            change = subscriber.change(None, 1)
            mirror = Mirror.create(
                tmp_path / "m", files(change.anchor.folder), change.anchor_position, subscriber.run.table
            )
            mirror.apply(change.delta, change.position)
        bucket.arrive()
        edit(weights, 3)
        restarted.publish(weights)
        restarted.flush(PATIENCE)
    assert [version for version, _ in log.list_commits(bucket, mirror.position.run)] == [0, 1, 1, 2]
    assert [commit.version for commit in commits(bucket)] == [0, 1, 2]
    assert equal(read_weights(bucket), served(weights))
    with mirror, Subscriber(bucket) as subscriber:
        change = subscriber.change(mirror.position, 2)  # whoever followed the trainer goes on
        assert equal(dict(mirror.weights) + change.delta, served(weights))


def test_a_head_that_arrives_late_leads_nobody_back():
    bucket, weights = fresh(), model()
    with publishing(bucket) as publisher:
        for step in range(3):
            edit(weights, step)
            publisher.publish(weights)
            publisher.flush(PATIENCE)
    run = commits(bucket)[0].run
    bucket.put("HEAD.json", write(Head(run, 0, commit_key(run, 0))))
    with Subscriber(bucket) as subscriber:
        assert subscriber.latest().version == 2
    with publishing(bucket) as publisher:
        assert publisher.position.version == 2
        edit(weights, 9)
        publisher.publish(weights)
    assert equal(read_weights(bucket), served(weights))


def test_a_trainer_killed_before_the_first_head_is_found_again():
    bucket, weights = fresh(), model()
    with publishing(bucket) as publisher:
        publisher.publish(weights)
    bucket.delete("HEAD.json")
    with publishing(bucket) as publisher:
        assert publisher.position.version == 0
        edit(weights, 1)
        publisher.publish(weights)
    assert [commit.version for commit in commits(bucket)] == [0, 1]
    assert equal(read_weights(bucket), served(weights))
