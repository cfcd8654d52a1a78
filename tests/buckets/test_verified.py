"""What a bucket gives is what was promised, or an error, and then nothing has changed."""

import uuid
from pathlib import Path

import pytest
from blake3 import blake3

from deltawire.buckets import Bucket, open_bucket
from deltawire.buckets.verified import download_verified, get_verified
from deltawire.errors import BadDigest, BucketError, DeltaWireError, NotFound, TooLarge, Truncated

DATA = bytes(range(256)) * 9000
PROMISE = {"size": len(DATA), "blake3": blake3(DATA).hexdigest()}


@pytest.fixture
def bucket() -> Bucket:
    return open_bucket(f"memory://{uuid.uuid4()}")


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_what_was_promised_arrives(bucket: Bucket, tmp_path: Path, data: bytes) -> None:
    bucket.put("delta", data)
    promise = {"size": len(data), "blake3": blake3(data).hexdigest()}
    download_verified(bucket, "delta", tmp_path / "delta", **promise)
    assert get_verified(bucket, "delta", **promise) == (tmp_path / "delta").read_bytes() == data


@pytest.mark.parametrize(
    ("stored", "error"),
    [
        (None, NotFound),
        (DATA[:-1], Truncated),
        (b"", Truncated),
        (DATA + b"x", TooLarge),
        (DATA[:-1] + b"\x00", BadDigest),
        (bytes([DATA[0] ^ 1]) + DATA[1:], BadDigest),
    ],
)
def test_anything_else_is_an_error_that_names_the_object_and_leaves_the_file_as_it_was(
    bucket: Bucket, tmp_path: Path, stored: bytes | None, error: type[DeltaWireError]
) -> None:
    if stored is not None:
        bucket.put("deltas/step_000001", stored)
    path = tmp_path / "delta"
    path.write_bytes(b"the old file")
    with pytest.raises(error, match=f"{bucket.url}/deltas/step_000001"):
        get_verified(bucket, "deltas/step_000001", **PROMISE)
    with pytest.raises(error, match=f"{bucket.url}/deltas/step_000001"):
        download_verified(bucket, "deltas/step_000001", path, **PROMISE)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("delta", b"the old file")]


def test_a_folder_that_is_not_there_is_named(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("delta", DATA)
    with pytest.raises(BucketError, match="nowhere"):
        download_verified(bucket, "delta", tmp_path / "nowhere" / "delta", **PROMISE)
