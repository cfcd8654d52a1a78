"""Signed runs: what a trusted key did not sign is refused, with the reason, and nothing of it is used."""

import stat

import msgspec
import pytest
from runs import commits, edit, fresh, model, publish_all, read_weights, replace_commit, served

from deltawire import Publisher, Subscriber, materialize
from deltawire.errors import AlreadyExists, BadSignature, ChainError, Forked, FormatError
from deltawire.runlog import signing
from deltawire.runlog.keys import HEAD_KEY, commit_key, run_key
from deltawire.runlog.log import list_versions
from deltawire.runlog.records import Commit, Derived, Head, Run, read, signed, write
from deltawire.weights.tensors import equal


@pytest.fixture
def key(tmp_path):
    return tmp_path / "trainer.key", signing.generate_key(tmp_path / "trainer.key")


@pytest.fixture
def run(key):
    """A signed run of three versions, and the trainer's key."""
    path, private = key
    bucket, weights, steps = fresh(), model(), []
    for step in range(3):
        edit(weights, step)
        steps.append({name: tensor.copy() for name, tensor in weights.items()})
    publish_all(bucket, *steps, signing_key=path)
    return bucket, private, served(weights)


def follow(bucket, *trusted):
    with Subscriber(bucket, trusted=trusted) as subscriber:
        return list(subscriber.updates()), subscriber.change(None, subscriber.latest().version)


def test_a_signed_run_is_read_with_its_key_and_without_any(run, tmp_path):
    bucket, key, weights = run
    assert len(follow(bucket, key.public)[0]) == len(follow(bucket)[0]) == 3
    assert equal(read_weights(bucket), weights)
    assert materialize(bucket, tmp_path / "out", trusted=[key.public]).position.version == 2


def test_a_key_file_lists_keys_and_comments(run, tmp_path):
    bucket, key, _ = run
    (tmp_path / "trusted").write_text(f"# trainers\n{key.public.upper()}  # the first\n\n")
    assert len(follow(bucket, tmp_path / "trusted")[0]) == 3


def test_an_unsigned_run_is_refused_by_who_trusts_a_key(run):
    _, key, _ = run
    bucket = fresh()
    publish_all(bucket, model())
    with pytest.raises(BadSignature, match=r"run\.json is not signed"):
        follow(bucket, key.public)


def test_a_run_signed_by_another_key_is_refused(run, tmp_path):
    bucket, _, _ = run
    other = signing.generate_key(tmp_path / "other.key")
    with pytest.raises(BadSignature, match="which is not trusted"):
        follow(bucket, other.public)


def test_an_altered_record_is_refused(run):
    bucket, key, _ = run
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, step=99))
    with pytest.raises(BadSignature, match="altered since"):
        follow(bucket, key.public)


def test_a_signature_of_another_record_is_refused(run):
    bucket, key, _ = run
    other = commits(bucket)[1]
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, signature=other.signature))
    with pytest.raises(BadSignature, match="altered since"):
        follow(bucket, key.public)


def test_a_record_replayed_at_another_place_is_no_version(run):
    bucket, key, _ = run
    name = commits(bucket)[0].run
    bucket.put(commit_key(name, 3), bucket.get(commit_key(name, 2), limit=1 << 20))
    assert follow(bucket, key.public)[1].position.version == 2
    bucket.put(HEAD_KEY, write(Head(name, 3, commit_key(name, 3))))
    with pytest.raises(ChainError, match="holds the commit of"):
        follow(bucket, key.public)


def test_a_commit_of_the_same_key_that_names_another_parent_is_refused(run):
    bucket, key, _ = run
    name = commits(bucket)[0].run
    data = bucket.get(commit_key(name, 1), limit=1 << 20)
    again = signed(msgspec.structs.replace(read(Commit, data, where=""), step=7), key)
    bucket.put(commit_key(name, 1), write(again))  # soundly signed: only the links tell
    with pytest.raises(Forked, match="rewritten"):
        follow(bucket, key.public)
    with Subscriber(bucket, trusted=[key.public]) as subscriber, pytest.raises(Forked, match="rewritten"):
        subscriber.change(None, 2)


def test_a_swapped_payload_is_refused(run):
    bucket, key, _ = run
    last = commits(bucket)[2]
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, payloads=commits(bucket)[1].payloads))
    with pytest.raises(BadSignature):
        follow(bucket, key.public)
    bucket.put(commit_key(last.run, 2), write(last))
    place = f"runs/{last.run}/{last.payloads[0].key}"
    data = bucket.get(place, limit=1 << 20)
    bucket.put(place, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match="promised"):
        follow(bucket, key.public)


def test_a_run_json_exchanged_for_another_of_the_same_key_is_refused(run):
    bucket, key, _ = run
    name = commits(bucket)[0].run
    record = read(Run, bucket.get(run_key(name), limit=1 << 20), where="")
    bucket.put(run_key(name), write(signed(msgspec.structs.replace(record, created=0.0), key)))
    with pytest.raises(Forked, match=r"another run\.json"):
        follow(bucket, key.public)


def test_a_compactor_signs_derived_records_and_nothing_else(tmp_path):
    trainer, compactor = (signing.generate_key(tmp_path / name) for name in ("t", "c"))
    trust = signing.trust([trainer.public]).also([compactor.public])
    derived = Derived("0" * 16, 1, 0, "0" * 64, {}, (), "0" * 64)
    data = write(signed(derived, compactor))
    record = read(Derived, data, where="")
    trust.check(data, record.signer, record.signature, where="a fold")
    with pytest.raises(BadSignature):
        signing.trust([trainer.public]).check(data, record.signer, record.signature, where="a fold")
    assert not signing.Trust().also([compactor.public])


def test_a_restarted_trainer_goes_on_signing(run, key):
    bucket, private, _ = run
    publish_all(bucket, model(9), signing_key=key[0])
    assert list_versions(bucket, commits(bucket)[0].run) == [0, 1, 2, 3]
    assert len(follow(bucket, private.public)[0]) == 4


def test_a_trainer_restarted_without_the_key_of_its_run_or_with_another_is_refused_when_it_opens(run, tmp_path):
    bucket, key, _ = run
    other = signing.generate_key(tmp_path / "other.key")
    before = [stat.key for stat in bucket.list()]
    another = {"signing_key": tmp_path / "other.key"}
    for options, says in [({}, "no signing_key was given"), (another, other.public[:16])]:
        with pytest.raises(BadSignature, match=rf"(?s)signed by {key.public[:16]}.*{says}.*--trust.*signing_key=…"):
            Publisher(bucket, **options)
    assert [stat.key for stat in bucket.list()] == before
    publish_all(bucket, model(9), run="supersede")
    assert commits(bucket)[0].signer is None


def test_a_private_key_given_as_one_to_trust_is_named_as_such_and_never_shown(tmp_path):
    public = signing.generate_key(tmp_path / "a.key").public
    secret = (tmp_path / "a.key").read_text()
    for given in (tmp_path / "a.key", secret):
        with pytest.raises(FormatError, match="is a private key: trust its public half") as caught:
            signing.trust([given])
        assert not any(line in str(caught.value) for line in secret.splitlines())
        assert isinstance(given, str) or public in str(caught.value)
    with pytest.raises(FormatError, match="the private key itself") as caught:
        signing.read_key(secret)
    assert secret.splitlines()[1] not in str(caught.value)
    with pytest.raises(FormatError, match="is a public key"):
        signing.read_key(public)


def test_a_key_file_is_private_and_never_overwritten_and_its_key_never_shown(tmp_path):
    path = tmp_path / "a.key"
    key = signing.generate_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signing.read_key(path).public == key.public
    assert key.public in repr(key)
    secret = key._private.private_bytes_raw().hex()
    assert secret not in repr(key)
    with pytest.raises(AlreadyExists):
        signing.generate_key(path)


@pytest.mark.parametrize("text", ["", "abc", "z" * 64, "\0"])
def test_what_is_no_key_is_refused(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(FormatError, match="public key"):
        signing.trust([tmp_path / "file"])
    with pytest.raises(FormatError, match="no private key"):
        signing.read_key(tmp_path / "file")
