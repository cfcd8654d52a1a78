"""Upload trouble is heard: in the log, in the bucket, and by whoever counts."""

import logging
import threading
import time

import msgspec
import pytest
from faults import Faulty, on_key
from runs import PATIENCE, edit, fresh, model, publishing
from waiting import until

from deltawire.errors import AccessRefused, Unavailable
from deltawire.publish.beats import TrainerBeats
from deltawire.publish.trouble import Trouble
from deltawire.runlog.heartbeats import TrainerBeat, read_trainer
from deltawire.runlog.keys import trainer_key

RUN = "0" * 16


def test_trouble_is_said_when_it_begins_changes_lasts_and_ends(caplog):
    now = [100.0]
    trouble = Trouble("s3://x", clock=lambda: now[0])
    trouble.over()
    refused = AccessRefused("c")
    for seconds, error in [(0, Unavailable("a")), (1, Unavailable("b")), (1, refused), (61, refused)]:
        now[0] += seconds
        trouble.failed(error)
    now[0] += 5
    trouble.over()
    trouble.over()
    assert [record.getMessage() for record in caplog.records] == [
        "s3://x: upload fails, and is tried again: Unavailable: a",
        "s3://x: upload fails for 2 s, and is tried again: AccessRefused: c",
        "s3://x: upload fails for 63 s, and is tried again: AccessRefused: c",
        "s3://x: uploads again, after 68 s",
    ]
    assert {record.name for record in caplog.records} == {"deltawire"}


def test_a_publisher_whose_uploads_fail_says_so_in_the_log(caplog, quick_retries):
    bucket = Faulty(fresh(), on_key("commits/000001", times=3))
    published, weights = [], model()
    with publishing(bucket, on_publish=published.append) as publisher:
        publisher.publish(weights)
        publisher.flush(PATIENCE)
        edit(weights, 1)
        publisher.publish(weights)
        publisher.flush(PATIENCE)
    assert [report.version for report in published] == [0, 1]
    said = [record.getMessage() for record in caplog.records if record.name == "deltawire"]
    assert len(said) == 2 and "upload fails" in said[0] and "Unavailable: planned for" in said[0]
    assert "uploads again" in said[1]
    assert {record.levelno for record in caplog.records if record.name == "deltawire"} == {logging.WARNING}


def test_a_trainer_says_what_waits_while_it_waits_and_that_it_ended():
    bucket, said = fresh(), [TrainerBeat(RUN, version=3, committed=1, waiting=2, problem="HTTP 503")]
    beats = TrainerBeats(bucket, lambda: said[0], every=0.01)
    first = until(lambda: read_trainer(bucket, RUN))
    assert (first.waiting, first.problem, first.ended) == (2, "HTTP 503", False)
    assert first.every == 30 and abs(first.at - time.time()) < PATIENCE
    said[0] = TrainerBeat(RUN, version=3, committed=3)
    until(lambda: read_trainer(bucket, RUN).waiting == 0)
    beats.close()
    assert read_trainer(bucket, RUN).ended


def test_a_short_run_and_one_that_has_nothing_to_say_write_nothing():
    bucket = fresh()
    TrainerBeats(bucket, lambda: TrainerBeat(RUN)).close()
    beats = TrainerBeats(bucket, lambda: None, every=0.001)
    time.sleep(0.02)
    beats.close()
    assert [*bucket.list()] == []


@pytest.mark.parametrize("error", [Unavailable("later"), AccessRefused("no")])
def test_a_store_that_refuses_it_disturbs_nobody(error):
    bucket = Faulty(fresh(), on_key("trainer.json", times=10**6, error=error))
    beats = TrainerBeats(bucket, lambda: TrainerBeat(RUN, waiting=1), every=0.001)
    until(lambda: bucket.asked)
    beats.close()
    assert "deltawire-trainer-beat" not in {thread.name for thread in threading.enumerate()}


def test_what_a_publisher_says_of_itself_is_what_waits(quick_retries):
    bucket = Faulty(fresh())
    weights = model()
    with publishing(bucket) as publisher:
        assert publisher._uploader.beat() is None
        publisher.publish(weights)
        run = publisher.flush(PATIENCE).run
        assert publisher._uploader.beat() == TrainerBeat(run, version=0, committed=0)
        bucket.plan = on_key("commits/000001", times=10**6)
        edit(weights, 1)
        publisher.publish(weights)
        until(lambda: publisher._uploader.beat().problem)
        beat = publisher._uploader.beat()
        assert (beat.version, beat.committed, beat.waiting) == (1, 0, 1) and beat.waiting_bytes > 0
        assert "planned for" in beat.problem
        bucket.plan = on_key("nothing")
        publisher.flush(PATIENCE)
        bucket.put(trainer_key(run), msgspec.json.encode(publisher._uploader.beat()))
        assert read_trainer(bucket, run).waiting == 0
