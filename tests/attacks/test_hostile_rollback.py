"""A bucket leads a reader that trusts a key neither back nor to another run of that key; not after a restart either."""

import json

import msgspec
import pytest
from runs import commits, edit, fresh, model, publish_all, publishing

from attacks.hostile import encode, replay, roll_back
from deltawire import Subscriber
from deltawire.errors import FormatError, OtherRun, RolledBack
from deltawire.read.seen import Seen, Sighting, given, place_of
from deltawire.runlog import signing
from deltawire.runlog.keys import commit_key
from deltawire.runlog.records import Commit, hash_of, read, signed


@pytest.fixture
def key(tmp_path):
    return tmp_path / "trainer.key", signing.generate_key(tmp_path / "trainer.key")


@pytest.fixture
def bucket(key):
    """A signed run of versions 0 to 5."""
    return signed_run(key, 6)


def signed_run(key, length, **options):
    bucket, weights = fresh(), model()
    grow(bucket, key, weights, length, **options)
    return bucket


def grow(bucket, key, weights, length, **options):
    with publishing(bucket, signing_key=key[0], **options) as publisher:
        for step in range(length):
            edit(weights, step)
            publisher.publish(weights)
            publisher.flush(30)


def look(seen, bucket, key, **options):
    """One look at the bucket, by a fresh reader; the version it is led to."""
    with Subscriber(bucket, trusted=[key[1].public]) as subscriber:
        newest = subscriber.latest()
        seen.admit(subscriber, newest, **options)
        return newest.version


@pytest.fixture
def place(tmp_path):
    return tmp_path / "state" / "engine.json"


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("head", [b"junk", None])
def test_a_bucket_with_its_newer_commits_removed_leads_nobody_back(bucket, key, place, restarts, head):
    seen = Seen(place)
    assert look(seen, bucket, key) == 5
    roll_back(bucket, commits(bucket)[0].run, 2, head=head)
    seen = Seen(place) if restarts else seen
    with pytest.raises(RolledBack, match=r":5 was seen, and the newest signed version there is 2.*--pin VERSION"):
        look(seen, bucket, key)
    assert look(seen, bucket, key, pinned=True) == 2
    with pytest.raises(RolledBack):  # the pin is taken away
        look(seen, bucket, key)
    assert look(Seen(place, forget=True), bucket, key) == 2
    assert look(Seen(place), bucket, key) == 2


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_another_run_of_the_same_key_is_not_followed(bucket, key, place, restarts, pinned):
    seen = Seen(place)
    look(seen, bucket, key)
    replay(signed_run(key, 9), bucket)
    seen = Seen(place) if restarts else seen
    with pytest.raises(RolledBack, match=r"now holds run .*--forget-state"):
        look(seen, bucket, key, pinned=pinned)
    assert look(Seen(place, forget=True), bucket, key) == 8


def test_an_older_state_of_the_same_bucket_is_not_followed(bucket, key, place):
    older = fresh()
    replay(bucket, older)
    grow(bucket, key, model(1), 3)
    seen = Seen(place)
    assert look(seen, bucket, key) == 8
    replay(older, bucket)
    with pytest.raises(RolledBack, match="newest signed version there is 5"):
        look(Seen(place), bucket, key)


@pytest.mark.parametrize("beyond", [0, 1])
def test_another_branch_that_the_key_signed_is_not_followed(bucket, key, place, beyond):
    other = fresh()
    replay(bucket, other)
    seen = Seen(place)
    grow(bucket, key, model(1), 1)
    assert look(seen, bucket, key) == 6
    grow(other, key, model(2), 1 + beyond)
    replay(other, bucket)
    with pytest.raises(RolledBack, match="was rewritten"):
        look(Seen(place), bucket, key)


def test_forward_is_newer_versions_and_runs_that_supersede(bucket, key, place):
    assert look(Seen(place), bucket, key) == 5
    grow(bucket, key, model(1), 2)
    assert look(Seen(place), bucket, key) == 7
    older = fresh()
    replay(bucket, older)
    grow(bucket, key, model(2), 1, run="supersede")
    assert look(Seen(place), bucket, key) == 0
    replay(older, bucket)
    with pytest.raises(RolledBack, match="does not continue it"):
        look(Seen(place), bucket, key)


def test_a_run_that_was_pruned_or_grew_far_is_gone_forward_to(bucket, key, place):
    look(Seen(place), bucket, key)
    run = commits(bucket)[0].run
    grow(bucket, key, model(1), 3)
    bucket.delete(commit_key(run, 5), commit_key(run, 6))
    assert look(Seen(place), bucket, key) == 8


def test_of_unsigned_records_nothing_is_remembered(place):
    bucket = fresh()
    publish_all(bucket, model(), model(1))
    with Subscriber(bucket) as subscriber:
        Seen(place).admit(subscriber, subscriber.latest())
    assert not place.exists()


@pytest.mark.parametrize("trusts", [True, False])
def test_a_run_that_is_named_is_the_only_one_followed(bucket, key, trusts):
    run = commits(bucket)[0].run

    def admit(seen):
        with Subscriber(bucket, trusted=[key[1].public] if trusts else []) as subscriber:
            seen.admit(subscriber, subscriber.latest())

    seen = Seen(run=run)
    admit(seen)
    with pytest.raises(OtherRun, match=f"holds run {run}, not 0000000000000000 nor one that continues it"):
        admit(Seen(run="0" * 16))
    grow(bucket, key, model(1), 1, run="supersede")
    admit(Seen(run=run))


def test_what_is_remembered_names_no_address(bucket, key, place):
    look(Seen(place), bucket, key)
    last = commits(bucket)[-1]
    assert json.loads(place.read_bytes()) == {
        "run": last.run, "version": 5, "hash": hash_of(bucket.get(commit_key(last.run, 5), limit=1 << 20)), "format": 1
    }  # fmt: skip
    assert place.parent.stat().st_mode & 0o777 == 0o700


def test_a_state_that_is_missing_or_cannot_be_written_is_one_warning(bucket, key, tmp_path, place):
    heard = []
    seen = Seen(place, on_doubt=heard.append)
    assert (look(seen, bucket, key), look(seen, bucket, key)) == (5, 5)
    assert len(heard) == 1
    assert "nothing was remembered" in heard.pop()
    Seen(place, on_doubt=heard.append)
    assert heard == []
    (tmp_path / "file").write_text("")
    seen = Seen(tmp_path / "file" / "engine.json", on_doubt=heard.append)
    look(seen, bucket, key)
    look(seen, bucket, key)
    assert len(heard) == 1
    assert "after a restart, an older version may be followed" in heard[0]
    roll_back(bucket, commits(bucket)[0].run, 2)
    with pytest.raises(RolledBack):  # this process remembers
        look(seen, bucket, key)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"run":"x","version":"5","hash":"y"}', b"[" * 10_000])
def test_a_damaged_state_is_refused_until_it_is_forgotten(bucket, key, place, damage):
    look(Seen(place), bucket, key)
    place.write_bytes(damage)
    with pytest.raises(FormatError, match=r"is damaged.*--forget-state"):
        Seen(place)
    assert place.read_bytes() == damage
    assert look(Seen(place, forget=True), bucket, key) == 5
    assert look(Seen(place), bucket, key) == 5


def test_a_state_has_its_place_by_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert place_of(None, "host-http-127-0-0-1-8000") == tmp_path / "deltawire" / "host-http-127-0-0-1-8000.json"
    assert place_of(tmp_path, "a/../b@lora") == tmp_path / "a-..-b@lora.json"
    assert place_of(f"{tmp_path}/new/", "a") == tmp_path / "new" / "a.json"
    assert place_of(tmp_path / "mine", "a") == given(str(tmp_path / "mine")) == tmp_path / "mine"
    assert given(None) is None


def test_a_commit_that_was_signed_anew_is_another(bucket, key, place):
    """The same version, signed by the key, with other words: an attacker has none such, a trainer that forgot does."""
    run = commits(bucket)[0].run
    look(Seen(place), bucket, key)
    where = commit_key(run, 5)
    last = read(Commit, bucket.get(where, limit=1 << 20), where=where)
    bucket.put(where, encode(signed(msgspec.structs.replace(last, step=99), key[1])))
    with pytest.raises(RolledBack, match="was rewritten"):
        look(Seen(place), bucket, key)


def test_a_sighting_says_which_version_it_is():
    assert str(Sighting("0" * 16, 3, "f" * 64)) == "0000000000000000:3"
