"""Memory as a bucket."""

import uuid

import pytest

from deltawire.buckets import Bucket, open_bucket
from deltawire.buckets.conformance import BucketTests


class TestMemoryBucket(BucketTests):
    @pytest.fixture
    def bucket(self) -> Bucket:
        return open_bucket(f"memory://{uuid.uuid4()}")


def test_one_name_is_one_bucket_within_the_process() -> None:
    open_bucket("memory://shared-by-name").put("key", b"x")
    assert open_bucket("memory://shared-by-name").get("key", limit=1) == b"x"
    assert list(open_bucket("memory://another-name").list()) == []
