"""`log`, `diff` and `tag` as people use them: what is listed, what moved, and names that prune keeps and pins find."""

import json
import time

import msgspec
import numpy as np
import pytest
from runs import chain_of_four, commits, fresh, publishing
from verbs import records, say

import deltawire as dw
from deltawire.errors import AlreadyExists, BadSignature, FormatError, Gap, NotFound, WrongBase
from deltawire.read.naming import name_version, version_named
from deltawire.runlog import log
from deltawire.runlog.keys import tag_key
from deltawire.runlog.records import Position
from deltawire.runlog.signing import generate_key, trust
from deltawire.runlog.tags import read_tag, read_tags, write_tag
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.retention import Policy
from deltawire.weights.movement import layer_of

REWARDS = (0.1, 0.7, 0.4)
HOUR = 3600.0


@pytest.fixture
def run(tmp_path):
    """A folder bucket of three versions, an hour apart, with metrics; its address."""
    url = (tmp_path / "bucket").as_uri()
    weights = {"model.layers.0.w": np.arange(1000, dtype=np.float16), "norm.b": np.zeros(3, np.float16)}
    ages = {"now": 3.0}
    with dw.Publisher(dw.open_bucket(url, create=True), clock=lambda: time.time() - HOUR * ages["now"]) as publisher:
        for step, reward in enumerate(REWARDS):
            ages["now"] = 3.0 - step
            bits = weights["model.layers.0.w"].view(np.uint16)
            bits[step * 7] += 1
            bits[step * 9 + 500] += 40
            publisher.publish(weights, step=step, metrics={"reward": reward, "loss": -reward})
            publisher.flush(20)
    return url


def test_log_shows_ages_metrics_shares_writer_and_tags(run):
    say("tag", "1", "good", "--bucket", run)
    shown = say("log", run)
    assert {"age", "share", "reward", "loss", "tags", "writer"} <= {*shown.split()}
    assert "good" in shown and "0.7" in shown and " h " in shown
    assert "signer" not in shown, "a column that no version has anything for"
    assert {*shown.splitlines()[-1]} <= {*"▁▂▃▄▅▆▇█"}, "a bar for each delta"
    only = say("log", run, "--metric", "reward").split()
    assert "reward" in only and "loss" not in only


def test_log_since_lists_the_young_and_counts_the_rest(run):
    assert [record["version"] for record in records("log", run, "--since", "150m")] == [1, 2]
    assert "1 older" in say("log", run, "--since", "150m")
    assert [record["version"] for record in records("log", run, "--since", "2000-01-01")] == [0, 1, 2]
    assert say("log", run, "--since", "1s") == "no version is this young; 3 are older\n"
    with pytest.raises(AssertionError, match="neither an age"):
        say("log", run, "--since", "yesterday")


def test_log_oneline_is_a_line_a_version(run):
    say("tag", "newest", "last", "--bucket", run)
    lines = say("log", run, "--oneline").splitlines()
    assert [line.split()[0] for line in lines] == ["000000", "000001", "000002"]
    assert "step 2" in lines[2] and "reward 0.4" in lines[2] and lines[2].endswith("(last)")


def test_log_as_json_leaves_digests_out_unless_asked(run):
    plain, asked = records("log", run)[1], records("log", run, "--digests")[1]
    assert "digests" not in plain and plain["changed_tensors"] == 1 and plain["metrics"]["reward"] == 0.7
    assert [*asked["digests"]] == ["model.layers.0.w"]


def test_diff_says_which_layers_moved_and_how_much_of_it_by_one_step(run, tmp_path):
    layers = records("diff", 0, 2, "--bucket", run)
    assert [(layer["name"], layer["moved"], layer["changed"], layer["ones"]) for layer in layers] == [
        ("model.layers.0", 1, 4, 2),
        ("norm", 0, 0, 0),
        ("all", 1, 4, 2),
    ]
    assert "50.0%" in say("diff", 0, 2, "--bucket", run)
    rows = records("diff", 0, 2, "--bucket", run, "--tensors")
    assert [row["name"] for row in rows] == ["model.layers.0.w", "norm.b", "all"]
    back = records("diff", 2, 0, "--bucket", run)
    assert [row["changed"] for row in back] == [row["changed"] for row in layers]
    for version in (0, 2):
        say("materialize", run, tmp_path / str(version), "--version", version)
    for more in ((), ("--bucket", run)):
        assert records("diff", tmp_path / "0", tmp_path / "2", *more) == layers
    with pytest.raises(AssertionError, match="no folder"):
        say("diff", 0, 2)


def test_a_layer_is_a_name_up_to_its_first_number():
    names = ["model.layers.11.mlp.experts.3.w", "model.embed_tokens.weight", "scale", "h.0.weight"]
    assert [layer_of(name) for name in names] == ["model.layers.11", "model.embed_tokens", "scale", "h.0"]


@pytest.mark.parametrize(
    ("word", "version"),
    [("1", 1), ("newest", 2), ("best:reward", 1), ("best:-loss", 1), ("best:loss", 0), ("good", 0)],
)
def test_a_version_has_many_names(run, word, version):
    say("tag", "0", "good", "--bucket", run)
    with dw.Subscriber(dw.open_bucket(run)) as subscriber:
        assert version_named(subscriber, word) == version


def test_a_name_that_is_not_there_says_what_is(run):
    say("tag", "0", "good", "--bucket", run)
    with dw.Subscriber(dw.open_bucket(run)) as subscriber:
        for word, kind, said in (
            ("bad", NotFound, "tags there: good"),
            ("best:x", NotFound, "loss, reward"),
            ("9", Gap, "0 to 2"),
        ):
            with pytest.raises(kind, match=said):
                version_named(subscriber, word)


def test_materialize_takes_a_tag_or_the_best(run, tmp_path):
    say("tag", "0", "good", "--bucket", run)
    for word, version in (("good", 0), ("best:reward", 1)):
        (report,) = records("materialize", run, tmp_path / word, "--version", word)
        assert report["position"]["version"] == version


def test_tags_are_listed_moved_and_removed(run):
    assert say("tag", "--bucket", run) == "no tags\n"
    assert say("tag", 0, "a", "--bucket", run) == "tag a: version 0\n"
    say("tag", 0, "a", "--bucket", run)
    with pytest.raises(AlreadyExists, match="names version 0; --move"):
        say("tag", 1, "a", "--bucket", run)
    assert "it named version 0 before" in say("tag", 1, "a", "--move", "--bucket", run)
    assert [(tag["name"], tag["version"]) for tag in records("tag", "--bucket", run)] == [("a", 1)]
    say("tag", "--delete", "a", "--bucket", run)
    with pytest.raises(NotFound):
        say("tag", "--delete", "a", "--bucket", run)


@pytest.mark.parametrize("name", ["12", "newest", "", "a/b", "best:reward", ".x", "x" * 101])
def test_a_name_that_could_be_taken_for_something_else_is_refused(name):
    bucket, _ = chain_of_four()
    with pytest.raises(FormatError, match="at most 100 letters"):
        write_tag(bucket, commits(bucket)[0].position, name)


def test_prune_keeps_what_has_a_tag(tmp_path):
    bucket, _ = chain_of_four()
    run = commits(bucket)[0].run
    with Compactor(bucket, tmp_path / "mirror", anchors=2) as compactor:
        compactor.step()
    policy = Policy(anchors=1, hours=0)
    free = retention.find_prunable(bucket, run, policy)
    assert free.floor > 1 and free.keys
    write_tag(bucket, commits(bucket)[1].position, "keep")
    held = retention.find_prunable(bucket, run, policy)
    assert (held.floor, held.tagged) == (free.floor, ((0, 1),))
    retention.carry_out(bucket, held)
    assert log.list_versions(bucket, run) == [0, 1, 3]
    shown = say("prune", bucket.url, "--keep-anchors", 1, "--keep-hours", 0)
    assert "nothing to delete" in shown and "versions 0 to 1 for tags" in shown


def test_a_version_that_was_pruned_while_it_got_its_tag_has_none(monkeypatch):
    bucket, _ = chain_of_four()
    (stat,) = [stat for stat in bucket.list("runs/") if stat.key.endswith("/commits/000001.json")]

    def prune(*arguments, **options):
        bucket.delete(stat.key)
        return write_tag(*arguments, **options)

    monkeypatch.setattr("deltawire.read.naming.write_tag", prune)
    with dw.Subscriber(bucket) as subscriber:
        with pytest.raises(Gap):
            name_version(subscriber, "1", "keep")
        assert read_tags(bucket, subscriber.run.run) == []


def test_a_tag_of_other_weights_is_refused():
    bucket, _ = chain_of_four()
    write_tag(bucket, Position(commits(bucket)[1].run, 1, "0" * 64), "forged")
    with dw.Subscriber(bucket) as subscriber, pytest.raises(WrongBase, match="other weights"):
        version_named(subscriber, "forged")


def test_a_tag_that_is_none_is_named_by_its_key_and_stops_no_listing():
    bucket, _ = chain_of_four()
    run = commits(bucket)[0].run
    write_tag(bucket, commits(bucket)[1].position, "good")
    moved = msgspec.json.encode({**msgspec.to_builtins(read_tag(bucket, run, "good")), "name": "other"})
    for name, data in {"junk": b"{", "moved": moved, "late": json.dumps({"run": run}).encode()}.items():
        bucket.put(tag_key(run, name), data)
        with pytest.raises(dw.DeltaWireError, match=name):
            read_tag(bucket, run, name)
    bucket.put(f"runs/{run}/tags/no tag.txt", b"")
    assert [tag.name for tag in read_tags(bucket, run)] == ["good"]


def test_a_reader_that_trusts_a_key_takes_only_its_tags(tmp_path):
    bucket, key, stranger = fresh(), generate_key(tmp_path / "key"), generate_key(tmp_path / "stranger")
    with publishing(bucket, signing_key=tmp_path / "key") as publisher:
        publisher.publish({"w": np.ones(3, np.float16)})
        publisher.flush(20)
    position = commits(bucket)[0].position
    write_tag(bucket, position, "mine", key=key)
    write_tag(bucket, position, "theirs", key=stranger)
    write_tag(bucket, position, "nobodys")
    with dw.Subscriber(bucket, trusted=[key.public]) as subscriber:
        assert version_named(subscriber, "mine") == 0
        for name in ("theirs", "nobodys"):
            with pytest.raises(BadSignature):
                version_named(subscriber, name)
        assert [tag.name for tag in read_tags(bucket, position.run, trust=trust([key.public]))] == ["mine"]


def test_a_verb_takes_what_a_unit_sets(run):
    assert "3 older" not in say("log", DELTAWIRE_BUCKET=run)
    assert '"version":2' in say("log", DELTAWIRE_BUCKET=run, DELTAWIRE_JSON="1")
    assert say("tag", DELTAWIRE_BUCKET=run) == "no tags\n"
