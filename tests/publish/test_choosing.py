"""`codec="auto"`: class or subset, by what takes less until it is served; never one that somebody cannot read."""

import time
from dataclasses import replace

import pytest
from class_runs import codecs, say
from runs import PATIENCE, commits, edit, fresh, model, publishing, read_weights, served
from verbs import say as told

from deltawire.errors import UnknownVersion
from deltawire.publish import choosing
from deltawire.publish.choosing import Chooser, Measured, Size, until_served
from deltawire.publish.receivers import Heard
from deltawire.publish.reports import PublishReport, UploadReport
from deltawire.runlog import log
from deltawire.runlog.records import Position
from deltawire.weights.tensors import equal

MODEL, CHANGED = 100_000_000, 1_000_000
SPEED = {"class": (0.054, 0.87), "subset": (0.038, 1.24)}
"""seconds and bytes a change, as on two cores"""
REPORT = PublishReport("0" * 16, 1, None, CHANGED, MODEL, 0, 2 * MODEL, 0.1, 0.1, 0, 0, 0, None)


class Fleet:
    """Receivers as a chooser sees them."""

    def __init__(self, replicas=1, cuts=()):
        self.heard = Heard(replicas, dict(cuts))


def run(chooser, versions, *, link, speed=SPEED):
    """So many versions over a link of so many bytes per second; the codec and the reason of each."""
    published, uploaded, made = chooser.hear(lambda report: None), chooser.hear_upload(lambda report: None), []
    for version in range(versions):
        choice = chooser.choose()
        codec = "class" if choice.by_class else "subset"
        seconds, share = speed[codec]
        size = int(CHANGED * share)
        published(replace(REPORT, codec=codec, compare_seconds=seconds, wire_bytes=size))
        uploaded(UploadReport(Position("0" * 16, version, "0" * 64), None, 1, size, size / link, 1))
        made.append((codec, choice.reason))
    return made


@pytest.mark.parametrize(("link", "best"), [(1e6, "class"), (1e7, "class"), (1e8, "subset"), (5e9, "subset")])
def test_a_slow_link_makes_it_class_and_a_fast_one_subset_once_both_were_measured(link, best):
    made = run(Chooser(Fleet(), "auto"), 20, link=link)
    assert [codec for codec, _ in made[:4]] == ["class", "class", "subset", "subset"]
    assert made[0][1] == "it takes fewer bytes, and no upload was measured yet"
    assert {codec for codec, _ in made[4:]} == {best}
    assert made[-1][1].startswith(f"until served {best} ")
    assert made[-1][1].endswith("MB/s")


def test_what_became_slow_is_seen_when_the_other_is_tried_again(monkeypatch):
    monkeypatch.setattr(choosing, "AGAIN", 10)
    chooser = Chooser(Fleet(), "auto")
    assert run(chooser, 8, link=1e7)[-1][0] == "class"
    denser = {"class": (0.5, 0.87), "subset": (0.04, 0.9)}
    made = run(chooser, 30, link=1e9, speed=denser)
    assert made[-1][0] == "subset"
    assert ("class", "to measure it again") in made


def test_the_model_adds_what_a_version_takes_up_to_the_server():
    size, measured = Size(1000, 10), [Measured(1e-3, 2.0), Measured(2e-3, 3.0)]
    assert until_served(size, "class", measured, 100.0) == pytest.approx(1.0 * (1 + choosing.DECODED["class"]) + 0.6)


def test_nobody_who_reads_class_or_somebody_who_does_not_makes_it_subset():
    for fleet, reason in (
        (Fleet(replicas=0), "no replica says that it reads class"),
        (Fleet(), "2 do not read class: a, b"),
    ):
        if reason.startswith("2"):
            fleet.heard = Heard(3, None, reason)
        assert set(run(Chooser(fleet, "auto"), 5, link=1.0)) == {("subset", reason)}
    chooser = Chooser(Fleet(replicas=0), "class")
    assert run(chooser, 1, link=1.0) == [("class", "asked for, and every replica reads it")]


def test_a_run_of_auto_lists_both_codecs_and_its_log_and_reports_say_which_and_why():
    bucket, weights, reports = fresh(), model(), []
    say(bucket, "a", "subset", "class", at=time.time())
    with publishing(bucket, codec="auto", on_publish=reports.append) as publisher:
        for version in range(4):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            edit(weights, version, share=0.05)
    say(bucket, "b", "subset", at=time.time())
    with publishing(bucket, codec="auto", on_publish=reports.append) as publisher:
        publisher.publish(weights)
    assert log.read_run(bucket, commits(bucket)[0].run).codecs == ("subset", "class")
    assert list(codecs(bucket).values()) == [report.codec for report in reports[1:]]
    assert reports[1].codec == "class"
    assert reports[-1].reason == "1 do not read class: b"
    assert commits(bucket)[-1].choice == "subset: 1 do not read class: b"
    assert equal(read_weights(bucket), served(weights))
    shown = told("log", "--bucket", bucket.url)
    assert "codec" in shown
    assert "version 4 is of subset: 1 do not read class: b" in " ".join(shown.split())


@pytest.mark.usefixtures("quick_retries")
def test_a_run_without_a_choice_says_nothing_of_one():
    bucket = fresh()
    with publishing(bucket, codec="subset") as publisher:
        publisher.publish(model())
    [commit] = commits(bucket)
    assert b'"choice"' not in bucket.get(f"runs/{commit.run}/commits/000000.json", limit=1 << 20)
    with pytest.raises(UnknownVersion, match='"subset", "class", "auto" or "gap"'), publishing(bucket, codec="best"):
        pass
