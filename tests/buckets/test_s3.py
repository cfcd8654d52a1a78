"""S3 for real: the protocol over HTTP against a moto server, conditional writes on."""

import sys

import pytest
from runs import PATIENCE, commits, edit, model, publish_all, publishing, read_weights, served

from deltawire import Publisher, materialize, open_bucket
from deltawire.buckets import objects
from deltawire.buckets.conformance import BucketTests
from deltawire.buckets.faulty import Faulty, at
from deltawire.errors import AlreadyExists, BucketError, Forked, NotFound, Unavailable
from deltawire.weights.tensors import equal


@pytest.fixture
def s3(s3_url):
    return open_bucket(s3_url)


class TestS3(BucketTests):
    large = 5 << 20

    @pytest.fixture
    def bucket(self, s3, monkeypatch):
        monkeypatch.setattr(objects, "ONE_REQUEST", self.large)
        monkeypatch.setattr(objects, "PART_BYTES", self.large)
        return s3

    @pytest.fixture
    def another(self, s3_url):
        return open_bucket(s3_url)


def test_put_new_is_fenced_by_the_store_itself(s3):
    s3.put_new("a", b"1")
    with pytest.raises(AlreadyExists):
        s3.put_new("a", b"2")
    assert s3.get("a", limit=9) == b"1"


def test_a_bucket_that_does_not_exist_is_not_found(s3):
    with pytest.raises(NotFound):
        open_bucket("s3://no-such-bucket-at-all").stat("a")


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("part", ["run.json", "anchors/", "commits/000000", "HEAD", "deltas/", "commits/000001"])
@pytest.mark.parametrize("kind", ["fail before", "fail after"])
def test_a_run_on_s3_survives_a_failed_write_and_a_lost_acknowledgement(s3, part, kind):
    weights, bucket = model(), Faulty(s3, at("put_new", part, kind))
    publish_all(bucket, weights, model(1))
    assert bucket.injected.total() == 1
    assert [commit.version for commit in commits(s3)] == [0, 1]
    assert equal(read_weights(s3, 0), served(weights))
    assert equal(read_weights(s3), served(model(1)))


def test_of_two_writers_on_s3_the_second_is_fenced_and_told_who_holds_the_run(s3, tmp_path):
    weights = model()
    publish_all(s3, weights)
    first, second = Publisher(s3), Publisher(s3)
    try:
        edit(weights, 1)
        first.publish(weights)
        first.flush(PATIENCE)
        second.publish(model(2))
        with pytest.raises(Forked, match=r"two trainers publish one run"):
            second.flush(PATIENCE)
    finally:
        first.close(PATIENCE)
        with pytest.raises(Forked, match=r" pid \d+"):
            second.close(PATIENCE)
    assert equal(read_weights(s3), served(weights))
    assert materialize(s3, tmp_path / "out").position.version == 1


def test_two_trainers_that_start_on_one_empty_bucket_get_one_run(s3):
    with publishing(s3) as first:
        second = Publisher(s3)
        first.publish(model())
        first.flush(PATIENCE)
        second.publish(model(1))
        with pytest.raises(Forked, match="two trainers publish to one bucket"):
            second.flush(PATIENCE)
        with pytest.raises(Forked):
            second.close(PATIENCE)
    assert equal(read_weights(s3), served(model()))


def test_an_endpoint_of_plain_http_and_a_proxy_are_both_taken_from_the_environment(s3, monkeypatch):
    s3.put("a", b"1")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("AWS_PROXY_URL", "http://127.0.0.1:1")  # nobody answers there
    with pytest.raises(Unavailable):
        open_bucket(s3.url).get("a", limit=1)


@pytest.mark.parametrize("unsafe", ["commits/../x", "commits//x", "commits/1/..", "commits/./x", "commits/1\x01x"])
def test_a_key_that_nobody_could_fetch_does_not_fail_a_listing(s3_url, s3_endpoint, unsafe):
    import boto3

    bucket, name = open_bucket(s3_url), s3_url.split("/")[2]
    for key in ("commits/0", "commits/2", "commits/3", "other"):
        bucket.put(key, b"x")
    before = {prefix: [*bucket.list(prefix, after="commits/0")] for prefix in ("", "commits/", "commits/2", "o")}
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.put_object(Bucket=name, Key=f"prefix/{unsafe}", Body=b"x")
    assert {prefix: [*bucket.list(prefix, after="commits/0")] for prefix in before} == before
    assert [stat.key for stat in bucket.list()] == ["commits/0", "commits/2", "commits/3", "other"]


def test_without_boto3_such_a_key_is_named_and_what_to_do(s3_url, s3_endpoint, monkeypatch):
    import boto3

    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.put_object(Bucket=s3_url.split("/")[2], Key="prefix/a/../b", Body=b"x")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(BucketError, match=r'"prefix/a/\.\./b".*remove that key, or pip install'):
        open_bucket(s3_url).list()
