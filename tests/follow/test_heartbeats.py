"""Heartbeats: old ones stay readable, and a fleet's together stay within what a store allows."""

import json

import msgspec
import pytest
from runs import fresh

from deltawire.buckets.wrappers import Counting
from deltawire.errors import AccessRefused, Unavailable
from deltawire.follow.beats import Beats, percentile
from deltawire.follow.health import Health
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat, TrainerBeat
from deltawire.runlog.keys import trainer_key
from deltawire.runlog.pace import Pace

HUB, CLOUD, FOLDER = 5.0, 2.0, 0.5
"""what `poll_seconds` is on each"""
CALLS = 1000
"""that the Hub allows a free user in 5 minutes"""


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def written(pace, clock, seconds, *, bucket, news=True, every=1.0):
    """How often somebody writes who asks each second."""
    count, end = 0, clock.now + seconds
    while clock.now < end:
        if pace.is_due(news=news):
            pace.wrote(bucket)
            count += 1
        clock.now += every
    return count


def test_a_heartbeat_of_an_older_deltawire_is_read_and_so_is_one_of_a_newer():
    bucket = fresh()
    old = {"replica": "a", "run": "0" * 16, "version": 3, "root": None, "need": None, "staged": None, "lag": 0}
    old |= {"audit": None, "error": None, "at": 5.0, "format": 1}
    bucket.put("replicas/a.json", json.dumps(old).encode())
    bucket.put("replicas/b.json", json.dumps({**old, "replica": "b", "later": {"x": [1]}}).encode())
    beats = [beat for _, beat in heartbeats.read_all(bucket)]
    assert [(beat.replica, beat.version, beat.pause_p50_ms, beat.codecs) for beat in beats] == [
        ("a", 3, None, ()),
        ("b", 3, None, ()),
    ]


@pytest.mark.parametrize("poll", [HUB, CLOUD])
def test_a_replica_with_news_at_every_look_writes_at_most_once_in_thirty_seconds(poll):
    clock = Clock()
    assert written(Pace(poll, clock=clock), clock, 300, bucket=fresh()) == 10
    clock.now += 1000
    assert written(Pace(poll, clock=clock), clock, 360, bucket=fresh(), news=False) == 3


def test_in_a_folder_news_is_written_at_once():
    clock = Clock()
    assert written(Pace(FOLDER, clock=clock), clock, 10, bucket=fresh()) == 10
    assert written(Pace(FOLDER, clock=clock), clock, 60, bucket=fresh(), news=False) == 2


@pytest.mark.parametrize("size", [1, 16, 200])
def test_the_heartbeats_of_a_fleet_take_at_most_a_quarter_of_what_the_hub_allows_and_looks_half(size):
    bucket, clock = fresh(), Clock()
    for number in range(size):
        heartbeats.beat(bucket, Heartbeat(f"replica-{number}"))
    pace = Pace(HUB, clock=clock)
    written(pace, clock, pace.floor + 1, bucket=bucket)
    assert size * written(pace, clock, 3600, bucket=bucket) / 12 <= CALLS / 4 + size / 12 + 1
    assert size * 3 * 300 / pace.poll(HUB) <= CALLS / 2 or pace.poll(HUB) == HUB
    assert Pace(CLOUD).poll(CLOUD) == CLOUD


def test_a_store_that_says_later_is_asked_half_as_often_until_it_answers():
    clock = Clock()
    pace = Pace(HUB, clock=clock)
    for floor in (60, 120, 240, 240):
        pace.refused(Unavailable("HTTP 429"))
        assert pace.floor == floor
        clock.now += floor - 1
        assert not pace.is_due(news=True)
        clock.now += 1
        assert pace.is_due(news=True)
    for _ in range(3):
        pace.answered()
    assert (pace.floor, pace.poll(HUB)) == (30, 5)
    pace.refused(AccessRefused("no"))
    assert pace.floor == 30


def test_what_a_joiner_needs_is_written_before_it_reads_however_little_time_has_passed():
    bucket = Counting(fresh())
    bucket.poll_seconds = HUB
    beats = Beats(bucket, "a", Health())
    beats.write(None)
    for error in (None, "Unavailable: x", None, "Unavailable: y"):
        beats.write(None, need=0 if error is None else None, error=error)
    assert bucket.traffic.calls == 3  # two writes, and the fleet was counted once
    ((_, beat),) = heartbeats.read_all(bucket)
    assert beat.need == 0


def test_a_heartbeat_tells_pauses_bytes_codecs_and_why_the_replica_is_not_ready():
    bucket = fresh()
    beats = Beats(bucket, "a", Health())
    heard = beats.hear(lambda report: None)
    for number in range(1, 201):
        heard(Update(pause_ms=float(number), wire_bytes=number))
    beats.write(None)
    ((_, beat),) = heartbeats.read_all(bucket)
    assert (beat.pause_p50_ms, beat.pause_p99_ms) == (150, 199)
    assert (beat.wire_bytes, beat.fetched_bytes, beat.codecs) == (200, 20100, ("subset", "class", "gap"))
    assert beat.unready == "no version is served yet"
    assert percentile([], 50) is None


class Update(msgspec.Struct):
    pause_ms: float
    wire_bytes: int


def test_a_trainers_record_is_read_back_and_junk_in_its_place_is_none():
    bucket, run = fresh(), "0" * 16
    assert heartbeats.read_trainer(bucket, run) is None
    said = TrainerBeat(run, version=3, committed=1, waiting=2, problem="x")
    bucket.put(trainer_key(run), msgspec.json.encode(said))
    assert heartbeats.read_trainer(bucket, run) == said
    for junk in (b"{", b'{"run": 3}', msgspec.json.encode(TrainerBeat("1" * 16)), b" " * (1 << 20)):
        bucket.put(trainer_key(run), junk)
        assert heartbeats.read_trainer(bucket, run) is None
