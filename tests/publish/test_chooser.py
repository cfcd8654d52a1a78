"""`codec="auto"`: class or subset, by what takes less until it is served; never one that somebody cannot read."""

import itertools
import time
from dataclasses import replace

import pytest
from class_runs import codecs, deltas, say
from runs import PATIENCE, commits, edit, fresh, model, publishing, read_weights, served
from verbs import say as told

from deltawire.errors import UnknownVersion
from deltawire.format import delta_file
from deltawire.publish import choosing
from deltawire.publish.choice import Choice
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


def run(chooser, versions, *, link, speed=SPEED, changed=CHANGED):
    """So many versions over a link of so many bytes per second; the codec and the reason of each."""
    published, uploaded, made = chooser.hear(lambda report: None), chooser.hear_upload(lambda report: None), []
    for version in range(versions):
        choice = chooser.choose()
        codec = "class" if choice.by_class else "subset"
        seconds, share = speed["whole" if choice.whole else codec]
        size = int(changed * share)
        published(replace(REPORT, codec=codec, seconds=seconds, wire_bytes=size, changed=changed))
        uploaded(UploadReport(Position("0" * 16, version, "0" * 64), None, 1, size, size / link, 1))
        made.append(("whole" if choice.whole else codec, choice.reason))
    return made


def test_where_the_uploader_s_thread_encodes_fewer_bytes_cost_no_publish_and_auto_says_so():
    chooser = Chooser(Fleet(), "auto")
    run(chooser, 6, link=1e9)
    assert not chooser.choose().by_class  # over so fast a link
    chooser.hear(lambda report: None)(replace(REPORT, codec="class", is_encoded=False))
    choice = chooser.choose()
    assert choice.by_class
    assert choice.reason == "it takes fewer bytes, and no publish waits for it: the uploader's thread encodes"


QUARTER = MODEL // 4
DENSE = {"class": (1.0, 0.6), "subset": (0.6, 0.62), "whole": (0.15, 2 * MODEL / QUARTER)}
"""a quarter changes, on a slow core: lists take 15 MB, and whole tensors 200 MB"""


@pytest.mark.parametrize(("link", "best"), [(1e7, "subset"), (2e8, "subset"), (2e9, "whole"), (1e11, "whole")])
def test_where_much_changes_a_fast_link_makes_it_whole_tensors_and_a_slow_one_never_tries_them(link, best):
    made = run(Chooser(Fleet(), "auto", whole=True), 20, link=link, speed=DENSE, changed=QUARTER)
    assert {way for way, _ in made[6:]} == {best}
    assert ("whole" in {way for way, _ in made}) == (best == "whole")
    if best == "whole":
        assert made[-1][1].startswith("whole tensors: until served 0.")
        assert " MB/s" in made[-1][1]


def test_whole_tensors_that_take_longer_than_was_thought_are_given_up_and_so_where_little_changes():
    chooser = Chooser(Fleet(), "auto", whole=True)
    slow = DENSE | {"whole": (5.0, 8.0)}
    made = [way for way, _ in run(chooser, 20, link=1e10, speed=slow, changed=QUARTER)]
    assert made.count("whole") == choosing.TRIES
    assert made[-1] == "subset"
    for asked, whole in (("auto", False), ("class", True)):
        made = run(Chooser(Fleet(), asked, whole=whole), 9, link=1e11, speed=DENSE, changed=QUARTER)
        assert "whole" not in {way for way, _ in made}
    assert "whole" not in {way for way, _ in run(Chooser(Fleet(), "auto", whole=True), 9, link=1e11)}


def test_whole_tensors_are_taken_again_once_sparse_ones_were_measured_again(monkeypatch):
    monkeypatch.setattr(choosing, "AGAIN", 10)
    for fleet in (Fleet(), Fleet(replicas=0)):
        made = [way for way, _ in run(Chooser(fleet, "auto", whole=True), 40, link=1e11, speed=DENSE, changed=QUARTER)]
        assert made[-8:].count("whole") >= 6, made


def test_what_class_comes_to_is_measured_where_no_tensor_may_be_of_it():
    chooser = Chooser(Fleet(), "auto")
    published, uploaded = chooser.hear(lambda report: None), chooser.hear_upload(lambda report: None)
    for version in range(6):
        choice = chooser.choose()
        published(replace(REPORT, version=version + 1, codec="subset", wire_bytes=CHANGED))
        uploaded(UploadReport(Position("0" * 16, version, "0" * 64), None, 1, CHANGED, 1.0, 1))
    assert choice.reason.startswith("until served")


def test_whole_tensors_go_into_a_file_that_every_reader_of_subset_reads(monkeypatch):
    bucket, weights, choices = fresh(), model(), itertools.count()
    monkeypatch.setattr(Chooser, "choose", lambda self: Choice(whole=next(choices) > 0, reason="said so"))
    with publishing(bucket, codec="auto") as publisher:
        for version in range(4):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            kept = served(weights)
            edit(weights, version, share=0.01)
            weights["embed.weight"] = -weights["embed.weight"]
    written = {version: delta_file.read_header(data) for version, data in deltas(bucket).items()}
    sizes = {version: len(data) for version, data in deltas(bucket).items()}
    encodings = {spec.name: how for spec, how in zip(written[3].tensors, written[3].encodings, strict=True)}
    assert encodings["embed.weight"] == "dense"
    assert {how for name, how in encodings.items() if name != "embed.weight"} <= {"subset", "dense"}
    assert sizes[3] > 2 * 60 * 8  # nothing of it is compressed
    assert commits(bucket)[-1].choice == "subset: said so"
    assert equal(read_weights(bucket), kept)


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
        assert {*run(Chooser(fleet, "auto"), 5, link=1.0)} == {("subset", reason)}
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
