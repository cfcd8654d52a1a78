"""Appending to the run log: payload, commit, head, once or twice or cut off anywhere, and reading it back."""

import pytest
from blake3 import blake3
from faults import Faulty, from_write, on_key
from runs import fresh

from deltawire.errors import AccessRefused, ChainError, Forked, FormatError, NotFound, TooLarge, Unavailable
from deltawire.runlog import log, records
from deltawire.runlog.keys import HEAD_KEY, commit_key, run_key
from deltawire.runlog.records import Commit, Head, Payload, Run
from deltawire.runlog.writing import Attempt, append
from deltawire.weights.table import TensorEntry

RUN = "0123456789abcdef"


def attempt(version=0, *, parent=None, content=b"payload", root="a" * 64):
    files = {f"anchors/step_{version:06d}/{n}.bin": content + bytes([n]) for n in range(2)}
    payloads = tuple(Payload(key, len(data), blake3(data).hexdigest()) for key, data in files.items())
    commit = Commit(RUN, version, parent, root, {}, payloads, 1.0)
    return Attempt(Run(RUN, (TensorEntry("w", "BF16", (1,)),), 1.0), commit, files)


def whole(bucket):
    """Whether everything a reader can reach is there."""
    for version in log.list_versions(bucket, RUN):
        log.read_run(bucket, RUN)
        for payload in log.load_commit(bucket, RUN, version).record.payloads:
            if bucket.stat(f"runs/{RUN}/{payload.key}").size != payload.size:
                return False
    return True


def test_an_append_writes_run_payloads_commit_and_head_in_this_order():
    bucket, steps = Faulty(fresh()), []
    append(bucket, attempt(), on_step=steps.append)
    assert steps == ["run", "payload", "payload", "commit", "head"]
    below = [key.removeprefix(f"runs/{RUN}/") for key in bucket.done]
    assert below == [
        "run.json",
        "anchors/step_000000/0.bin",
        "anchors/step_000000/1.bin",
        "commits/000000.json",
        HEAD_KEY,
    ]
    append(bucket, attempt(1, parent=0))
    assert f"runs/{RUN}/run.json" not in bucket.done[5:]
    assert log.list_versions(bucket, RUN) == [0, 1]
    assert log.read_head(bucket) == Head(RUN, 1, commit_key(RUN, 1))


@pytest.mark.parametrize("step", range(5))
def test_an_append_killed_after_any_step_shows_a_reader_no_commit_without_its_payloads(step):
    bucket, left = fresh(), [step]

    def killed(name):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1

    with pytest.raises(KeyboardInterrupt):
        append(bucket, attempt(), on_step=killed)
    assert whole(bucket)
    append(bucket, attempt())
    assert whole(bucket)
    assert log.read_head(bucket).version == 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n", range(5))
def test_an_append_that_fails_at_any_write_is_finished_by_sending_the_same_again(n, after):
    store = fresh()
    with pytest.raises(Unavailable):
        append(Faulty(store, from_write(n, after=after)), attempt())
    assert whole(store)
    append(store, attempt())
    assert log.list_versions(store, RUN) == [0]
    assert log.load_commit(store, RUN, 0).record == attempt().commit


def test_appending_twice_is_appending_once():
    bucket = fresh()
    append(bucket, attempt())
    before = {stat.key: bucket.get(stat.key, limit=1 << 20) for stat in bucket.list()}
    append(bucket, attempt())
    assert {stat.key: bucket.get(stat.key, limit=1 << 20) for stat in bucket.list()} == before


@pytest.mark.parametrize("part", ["run.json", "0.bin", "commits/", "HEAD"])
def test_a_lost_acknowledgement_is_found_out_by_the_next_try(part):
    bucket = Faulty(fresh(), on_key(part, after=True))
    with pytest.raises(Unavailable):
        append(bucket, attempt())
    append(bucket, attempt())
    assert whole(bucket)
    assert len(bucket.sent(part)) == 2
    assert len(set(bucket.sent(part))) == 1


def test_a_commit_of_someone_else_in_our_place_is_a_fork_and_stays_as_it_is():
    bucket = fresh()
    append(bucket, attempt())
    append(bucket, attempt(1, parent=0))
    with pytest.raises(Forked, match=r"commits/000001\.json was written by someone else.*Stop one of them"):
        append(bucket, attempt(1, parent=0, root="b" * 64))
    assert log.load_commit(bucket, RUN, 1).record.root == "a" * 64


def test_a_refusal_is_raised_as_it_came():
    with pytest.raises(AccessRefused, match="read-only"):
        append(Faulty(fresh(), on_key("bin", error=AccessRefused("read-only token"))), attempt())


def test_a_bucket_without_a_head_has_nothing_published():
    with pytest.raises(NotFound, match="nothing is published there yet"):
        log.read_head(fresh())


def test_a_head_that_is_no_record_is_named():
    bucket = fresh()
    bucket.put(HEAD_KEY, b"<html>login</html>")
    with pytest.raises(FormatError, match=r"memory://.*/HEAD\.json: not a head record"):
        log.read_head(bucket)


def test_a_record_beyond_the_bound_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(log, "MAX_HEAD", 100)
    bucket = fresh()
    bucket.put(HEAD_KEY, b" " * 101)
    with pytest.raises(TooLarge):
        log.read_head(bucket)


def test_records_under_another_records_key_are_refused():
    bucket = fresh()
    append(bucket, attempt())
    other = "f" * 16
    bucket.put(run_key(other), bucket.get(run_key(RUN), limit=1 << 20))
    bucket.put(commit_key(RUN, 1), bucket.get(commit_key(RUN, 0), limit=1 << 20))
    bucket.put(commit_key(other, 0), bucket.get(commit_key(RUN, 0), limit=1 << 20))
    with pytest.raises(ChainError, match=f"is the record of run {RUN}"):
        log.read_run(bucket, other)
    for run, version in ((RUN, 1), (other, 0)):
        with pytest.raises(ChainError, match=f"holds the commit of {RUN}:0"):
            log.load_commit(bucket, run, version)


def test_a_listing_counts_commits_and_nothing_else():
    bucket = fresh()
    names = ["000000", "000010", "000002", "1000000"]
    junk = ["2", "0000002", "²", "٣", "+5", "-1", "1e3", "000003.json.part", "0_1", ""]
    for name in names + junk:
        bucket.put(f"runs/{RUN}/commits/{name}.json", b"")
    bucket.put(f"runs/{RUN}/commits/000007", b"")
    bucket.put(f"runs/{RUN}0/commits/000008.json", b"")
    assert log.list_versions(bucket, RUN) == [0, 2, 10, 1_000_000]


def test_a_record_that_no_reader_would_accept_never_reaches_the_bucket():
    bucket = fresh()
    with pytest.raises(FormatError):
        append(bucket, attempt(root="short"))
    assert [stat.key for stat in bucket.list(f"runs/{RUN}/commits/")] == []
    assert records.write(attempt().commit)
