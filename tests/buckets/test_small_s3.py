"""S3 as stores really answer: conflicts, conditions that are ignored, refusals that are final, lost ones, proxies."""

import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
from programs import program
from runs import PATIENCE, edit, model, publish_all, publishing, read_weights, served
from small_s3 import Answer, Asked, SmallS3, once, small_s3

from deltawire import materialize, open_bucket, verify
from deltawire.buckets import clouds, objects
from deltawire.buckets.conformance import BucketTests
from deltawire.errors import (
    AccessRefused,
    AlreadyExists,
    BadUrl,
    BucketError,
    Forked,
    NotFound,
    OutOfSpace,
    Unavailable,
)
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import equal

pytestmark = pytest.mark.usefixtures("quick_retries", "hasty_client")
CONFLICT = Answer(409, "ConditionalRequestConflict")


@pytest.fixture(scope="module")
def hasty_client():
    """obstore's own retries, at once."""
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clouds._QUICK_RETRIES, "backoff", at_once)
        yield


@pytest.fixture
def s3():
    with small_s3() as store:
        yield store


@pytest.fixture(params=["ignored", "501"])
def plain(request):
    """A store without conditional writes, one way or the other."""
    with small_s3(SmallS3(conditional=request.param)) as store:
        yield store


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(objects, "ONE_REQUEST", 1 << 20)
    monkeypatch.setattr(objects, "PART_BYTES", 1 << 20)


class TestWithoutConditions(BucketTests):
    large = 1 << 20

    @pytest.fixture
    def bucket(self, small_parts):
        with small_s3(SmallS3(conditional="ignored")):
            yield open_bucket("s3://b/prefix")

    @pytest.fixture
    def another(self, bucket):
        return open_bucket(bucket.url)


class TestHubGateway(BucketTests):
    """`https://s3.hf.co/<namespace>`: the namespace in the path, and reads that are sent on to a signed address."""

    large = 1 << 20

    @pytest.fixture
    def another(self, bucket):
        return open_bucket(bucket.url)

    @pytest.fixture
    def bucket(self, small_parts):
        with small_s3() as elsewhere:
            store = SmallS3(elsewhere=elsewhere.url)
            store.objects, store.sizes = elsewhere.objects, elsewhere.sizes
            with small_s3(store, path="/me"):
                yield open_bucket("s3://run")


# A conflict is no answer


@pytest.mark.parametrize("part", ["run.json", "anchors/", "deltas/", "commits/000000", "commits/000001", "HEAD"])
def test_a_conflict_is_tried_again_and_every_payload_of_a_commit_is_there(s3, part, tmp_path):
    bucket = open_bucket("s3://b/run")
    s3.plan = once("PUT", part, CONFLICT, times=2)
    weights = publish_two(bucket)
    assert s3.plan(Asked("PUT", part, {}, {}, 0)) is None  # both conflicts happened
    assert verify(bucket)
    assert equal(read_weights(bucket), served(weights))
    assert materialize(bucket, tmp_path / "out").position.version == 1


def publish_two(bucket):
    weights = model()
    with publishing(bucket) as publisher:
        publisher.publish(weights)
        publisher.flush(PATIENCE)
        edit(weights, 1)
        publisher.publish(weights)
    return weights


def test_a_conflict_means_try_again_unless_the_key_is_there(s3):
    bucket = open_bucket("s3://b")
    s3.plan = once("PUT", "new", CONFLICT, times=2)
    with pytest.raises(Unavailable, match=r"b/new.*conflicting"):
        bucket.put_new("new", b"1")
    with pytest.raises(Unavailable, match=r"b/new.*conflicting"):
        bucket.put("new", b"1")
    bucket.put("there", b"1")
    s3.plan = once("PUT", "there", CONFLICT)
    with pytest.raises(AlreadyExists):
        bucket.put_new("there", b"2")


def test_a_compactor_that_meets_a_conflict_leaves_no_manifest_without_its_payload(s3, tmp_path):
    bucket, weights = open_bucket("s3://b/run"), model()
    versions = [model()] + [edited(weights, step) for step in range(1, 5)]
    publish_all(bucket, *versions)
    s3.plan = once("PUT", "folds/", CONFLICT)
    with Compactor(bucket, tmp_path / "mirror", levels=(4,), anchors="never") as compactor:
        with pytest.raises(Unavailable, match="folds"):
            compactor.step()
        assert not [key for key in s3.objects if "/derived/" in key]
        assert compactor.step()
    assert verify(bucket)


def edited(weights, step):
    edit(weights, step)
    return dict(weights)


@pytest.mark.parametrize("there", ["nothing", "half", "other bytes"])
def test_what_lies_damaged_under_a_payloads_key_is_written_again(s3, there):
    """The first try of a delta arrives and is damaged there, and its acknowledgement is lost."""
    bucket, weights = open_bucket("s3://b/run"), model()

    def damage(asked):
        arrived = [key for key in s3.objects if "/deltas/" in key]
        for key in arrived:
            size = len(s3.objects[key])
            s3.store(key, {"nothing": b"", "half": bytes(size // 2), "other bytes": bytes(size)}[there])
            s3.plan = lambda asked: None
        return Answer(503, after=True) if "/deltas/" in asked.key and not arrived else None

    with publishing(bucket) as publisher:
        publisher.publish(weights)
        publisher.flush(PATIENCE)
        s3.plan = damage
        edit(weights, 1)
        publisher.publish(weights)
        publisher.flush(PATIENCE)
    assert verify(bucket)
    assert equal(read_weights(bucket), served(weights))


# Conditions that are not kept


def test_a_store_that_keeps_its_condition_is_proved_once(s3):
    bucket = open_bucket("s3://b/run")
    for number in range(4):
        bucket.put_new(f"commits/{number}", b"x")
    assert bucket.conditional_writes
    assert len(s3.requests("PUT")) == 6


def test_a_store_that_ignores_or_lacks_the_condition_says_so_after_the_first_write(plain):
    bucket = open_bucket("s3://b/run")
    bucket.put_new("commits/0", b"x")
    assert not bucket.conditional_writes
    with pytest.raises(AlreadyExists):
        bucket.put_new("commits/0", b"y")
    assert bucket.get("commits/0", limit=1) == b"x"


def test_where_the_condition_is_ignored_the_second_of_two_trainers_is_told(plain):
    weights, other = model(), model()
    publish_all(open_bucket("s3://b/run"), weights)
    first, told = publishing(open_bucket("s3://b/run")), pytest.raises(Forked, match="two trainers")
    with first as first, told, publishing(open_bucket("s3://b/run")) as second:
        edit(weights, 1)
        first.publish(weights)
        first.flush(PATIENCE)
        edit(other, 2)
        second.publish(other)
        second.flush(PATIENCE)
    assert equal(read_weights(open_bucket("s3://b/run")), served(weights))


def test_through_the_gateway_of_the_hub_the_second_of_two_trainers_is_refused_by_the_store():
    weights, other = model(), model()
    with small_s3(path="/me") as store:
        publish_all(open_bucket("s3://run"), weights)
        first, told = publishing(open_bucket("s3://run")), pytest.raises(Forked, match="two trainers")
        with first as first, told, publishing(open_bucket("s3://run")) as second:
            for publisher, trained, step in ((first, weights, 1), (second, other, 2)):
                edit(trained, step)
                publisher.publish(trained)
                publisher.flush(PATIENCE)
        assert open_bucket("s3://run").conditional_writes
        assert equal(read_weights(open_bucket("s3://run")), served(weights))
        assert all("if-none-match" in asked.headers for asked in store.requests("PUT", "commits/"))


@pytest.mark.parametrize("changes", [0, 1])
def test_where_the_condition_is_ignored_no_commit_is_ever_written_over(plain, changes):
    """From a process's first append on, and if that has no payload: a commit's key holds its hash there."""
    weights = model()
    publish_all(open_bucket("s3://b/run"), weights)
    for _ in range(changes):
        edit(weights, 1)
    publish_all(open_bucket("s3://b/run"), weights)
    assert len([key for key in plain.objects if re.search(r"/commits/00000\d-\w+\.json$", key)]) == 2


def test_the_probe_is_removed_where_that_is_allowed_and_harmless_where_not(s3):
    bucket = open_bucket("s3://b/run")
    bucket.put_new("commits/0", b"x")
    assert sorted(s3.objects) == ["run/commits/0"]
    s3.plan = lambda asked: Answer(403, "AccessDenied") if asked.method in ("POST", "DELETE") else None
    again = open_bucket("s3://b/run")
    again.put_new("commits/1", b"x")
    assert again.conditional_writes
    assert len(s3.objects) == 3


# Final, and later


def test_where_conditions_are_switched_off_by_the_environment_a_look_comes_first(s3, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    bucket = open_bucket("s3://b")
    bucket.put_new("key", b"1")
    assert not bucket.conditional_writes
    with pytest.raises(AlreadyExists):
        bucket.put_new("key", b"2")


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (Answer(301, "PermanentRedirect"), BucketError, "AWS_REGION"),
        (Answer(307, "TemporaryRedirect"), BucketError, "AWS_REGION"),
        (Answer(400, "AuthorizationHeaderMalformed"), BucketError, "AWS_REGION"),
        (Answer(400, "ExpiredToken"), AccessRefused, "expired"),
        (Answer(400, "EntityTooLarge"), BucketError, "size"),
        (Answer(400, ""), BucketError, "400"),
        (Answer(401, ""), AccessRefused, "does not accept these credentials"),
        (Answer(403, "InvalidAccessKeyId"), AccessRefused, "does not accept these credentials"),
        (Answer(403, "AccessDenied"), AccessRefused, "may not do this"),
        (Answer(403, "RequestTimeTooSkewed"), AccessRefused, "clock"),
        (Answer(404, "NoSuchBucket"), NotFound, "no such bucket"),
        (Answer(407, ""), BucketError, "proxy"),
        (Answer(501, "NotImplemented"), BucketError, "no such operation"),
        (Answer(507, "XMinioStorageFull"), OutOfSpace, "space"),
        (Answer(400, "RequestTimeout"), Unavailable, ""),
        (Answer(408, ""), Unavailable, ""),
        (Answer(429, "SlowDown"), Unavailable, ""),
        (Answer(500, "InternalError"), Unavailable, ""),
        (Answer(503, "SlowDown"), Unavailable, ""),
        (Answer(drop=True), Unavailable, ""),
    ],
    ids=lambda value: getattr(value, "code", None),
)
def test_only_what_may_pass_is_unavailable(s3, tmp_path, answer, kind, says):
    bucket = open_bucket("s3://b")
    s3.plan = lambda asked: answer
    for verb in (
        lambda: bucket.put("key", b"1"),
        lambda: bucket.get("key", limit=1),
        lambda: list(bucket.list()),
        lambda: bucket.delete("key"),
    ):
        with pytest.raises(BucketError, match=says or None) as refusal:
            verb()
        assert isinstance(refusal.value, kind)
        assert isinstance(refusal.value, Unavailable) == (kind is Unavailable)
        assert "s3://b" in str(refusal.value)


@pytest.mark.parametrize(
    "answer", [Answer(301), Answer(400, "ExpiredToken"), Answer(400, "EntityTooLarge"), Answer(501)]
)
def test_a_final_refusal_ends_the_wait_of_a_trainer(s3, answer):
    with pytest.raises(BucketError) as refusal, publishing(open_bucket("s3://b/run")) as publisher:
        publisher.publish(model())
        publisher.flush(PATIENCE)
        s3.plan = lambda asked: answer if asked.method == "PUT" else None
        edit(weights := model(), 1)
        publisher.publish(weights)  # leaving the block waits for as long as it takes
    assert not isinstance(refusal.value, Unavailable)


def test_a_read_that_breaks_off_is_unavailable_and_leaves_the_old_file(s3, tmp_path):
    bucket = open_bucket("s3://b")
    bucket.put("key", b"123456")
    (tmp_path / "out").write_bytes(b"old")
    s3.plan = lambda asked: Answer(drop=True) if asked.method == "GET" else None
    with pytest.raises(Unavailable):
        bucket.get_file("key", tmp_path / "out", limit=6)
    assert (tmp_path / "out").read_bytes() == b"old"


# Large objects


@pytest.mark.parametrize("verb", ["put", "put_new"])
def test_a_large_object_goes_in_equal_parts_and_a_failed_one_leaves_none(s3, small_parts, tmp_path, verb):
    bucket, data = open_bucket("s3://b"), os.urandom((2 << 20) + 5)
    source = tmp_path / "source"
    source.write_bytes(data)
    s3.plan = lambda asked: Answer(503) if asked.query.get("partNumber") == "2" else None
    with pytest.raises(Unavailable):
        getattr(bucket, verb)("large", source)
    assert s3.objects == s3.parts == {}
    s3.plan, s3.asked = lambda asked: None, []
    getattr(bucket, verb)("large", source)
    assert bucket.get("large", limit=len(data)) == data
    sizes = [asked.size for asked in sorted(s3.requests("PUT"), key=lambda asked: asked.query["partNumber"])]
    assert sizes == [1 << 20, 1 << 20, 5]


def test_a_large_object_is_fetched_in_pieces_none_of_which_takes_long(s3, small_parts, tmp_path):
    """obstore gives up on a request after some time, whatever has arrived: a whole anchor never would."""
    bucket, data = open_bucket("s3://b"), os.urandom((2 << 20) + 5)
    bucket.put("large", data)
    s3.plan = once("GET", "large", Answer(503), times=2)
    bucket.get_file("large", tmp_path / "out", limit=len(data))
    assert (tmp_path / "out").read_bytes() == bucket.get("large", limit=len(data)) == data
    ranges = [asked.headers["range"] for asked in s3.requests("GET") if "range" in asked.headers]
    assert ranges[:3] == ["bytes=0-1048575", "bytes=1048576-2097151", "bytes=2097152-2097156"]


def test_a_large_object_that_changes_while_it_is_fetched_is_no_mixture(s3, small_parts, tmp_path):
    bucket = open_bucket("s3://b")
    bucket.put("large", bytes(2 << 20))

    def change(asked):
        if asked.headers.get("range", "").startswith("bytes=1048576"):
            s3.store("large", b"1" * (2 << 20))

    s3.plan = change
    with pytest.raises(BucketError, match="large"):
        bucket.get_file("large", tmp_path / "out", limit=2 << 20)
    assert not (tmp_path / "out").exists()


def test_a_large_object_is_not_written_over_another(s3, small_parts):
    bucket = open_bucket("s3://b")
    bucket.put("large", b"first")
    with pytest.raises(AlreadyExists):
        bucket.put_new("large", bytes(2 << 20))
    assert bucket.get("large", limit=5) == b"first"


def test_an_object_of_more_than_ten_thousand_parts_gets_larger_ones(s3, small_parts, monkeypatch):
    monkeypatch.setattr(objects, "PARTS", 2)
    open_bucket("s3://b").put("large", bytes((2 << 20) + 1))
    assert sorted(asked.size for asked in s3.requests("PUT")) == [1 << 20, (1 << 20) + 1]


@pytest.mark.parametrize("size", [100 << 20, pytest.param(6 << 30, marks=pytest.mark.nightly)])
def test_memory_does_not_grow_with_the_object(tmp_path, size):
    """The nightly one is larger than what S3 takes in one request."""
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size)
    with small_s3(SmallS3(keep=False)) as store:
        done = subprocess.run(
            [sys.executable, program("upload_measured"), str(tmp_path / "large")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert store.sizes["large"] == size
        assert max(asked.size for asked in store.requests("PUT")) <= objects.PART_BYTES
    grown = int(done.stdout) << 10
    assert grown < (2 * objects.AT_ONCE + 2) * objects.PART_BYTES, f"{size >> 20} MiB added {grown >> 20} MiB"


# Credentials, endpoints, proxies

NO_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")


@pytest.fixture
def home(s3, tmp_path, monkeypatch):
    """A user without variables; what is written to `.aws` counts. Nobody gives keys to machines here."""
    for name in NO_KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def test_keys_region_and_endpoint_of_a_profile_are_used(s3, home, monkeypatch):
    (home / "credentials").write_text("[team]\naws_access_key_id = from-profile\naws_secret_access_key = x\n")
    (home / "config").write_text(f"[profile team]\nregion = eu-west-3\nendpoint_url = {s3.url}\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    open_bucket("s3://b").put("key", b"1")
    assert "from-profile/" in s3.asked[-1].headers["authorization"]
    assert "/eu-west-3/" in s3.asked[-1].headers["authorization"]


def test_a_profile_that_is_not_there_is_named(home, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "typo")
    with pytest.raises(BadUrl, match=r"typo.*AWS_PROFILE"):
        open_bucket("s3://b")


def test_without_credentials_the_variables_are_named(s3, home, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    with pytest.raises(
        AccessRefused, match=r"no credentials.*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.*AWS_PROFILE"
    ):
        open_bucket("s3://b").stat("key")


def test_without_boto3_a_silent_metadata_service_means_no_credentials(s3, home, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(AccessRefused, match=r"no credentials.*deltawire\[s3\]"):
        open_bucket("s3://b").stat("key")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://", "not an address", "ftp://host"])
def test_an_endpoint_that_is_no_address_is_refused(s3, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(BadUrl, match="AWS_ENDPOINT_URL"):
        open_bucket("s3://b")


@pytest.fixture
def proxied(monkeypatch):
    """An environment whose proxy answers nobody."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.org")


def test_what_listens_on_loopback_is_never_asked_through_a_proxy(s3, proxied):
    bucket = open_bucket("s3://b")
    bucket.put("key", b"1")
    assert bucket.get("key", limit=1) == b"1"
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost,::1"


def test_a_proxy_in_the_way_is_named_without_its_password(s3, proxied, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid")
    with pytest.raises(Unavailable, match=r"through the proxy 127\.0\.0\.1:1 that HTTP_PROXY names") as refusal:
        open_bucket("s3://b").stat("key")
    assert "secret" not in str(refusal.value)
