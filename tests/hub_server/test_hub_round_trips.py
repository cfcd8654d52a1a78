"""What the unmodified Hub client uploads comes back bit for bit, and is sent only once."""

import random
import struct
from pathlib import Path

import pytest
from hub_client import Ask, run_client
from huggingface_hub import HfApi, HfFileSystem

from deltawire.hub_server import HubProcess

MEGABYTE = 1_000_000


def download(api: HfApi, bucket: str, path: str, folder: Path) -> bytes:
    api.download_bucket_files(bucket, [(path, folder / "copy")], raise_on_missing_files=True)
    return (folder / "copy").read_bytes()


def stats(request_hub: Ask) -> dict[str, int]:
    return request_hub("GET", "/_deltawire/stats").json()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"x", id="one byte"),
        pytest.param(random.Random(1).randbytes(5 * MEGABYTE), id="random"),
        pytest.param(bytes(3 * MEGABYTE), id="zeros"),
        pytest.param(b"to be or not to be " * 100_000, id="text"),
        pytest.param(struct.pack("<500000f", *range(500_000)), id="floats"),
    ],
)
def test_a_file_comes_back_bit_for_bit(api: HfApi, bucket: str, tmp_path: Path, content: bytes) -> None:
    api.batch_bucket_files(bucket, add=[(content, "a/file")])
    assert download(api, bucket, "a/file", tmp_path) == content


def test_a_file_from_disk_and_many_small_ones_come_back(api: HfApi, bucket: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(MEGABYTE))
    small = [(f"content {number}".encode(), f"small/{number}") for number in range(50)]
    api.batch_bucket_files(bucket, add=[(source, "big"), *small])
    assert download(api, bucket, "big", tmp_path) == source.read_bytes()
    wanted = [(path, tmp_path / path) for _, path in small]
    api.download_bucket_files(bucket, wanted, raise_on_missing_files=True)
    assert [(tmp_path / path).read_bytes() for _, path in small] == [content for content, _ in small]


def test_an_overwritten_path_reads_as_the_new_file(api: HfApi, bucket: str, tmp_path: Path) -> None:
    api.batch_bucket_files(bucket, add=[(b"old", "file")])
    api.batch_bucket_files(bucket, add=[(b"new and longer", "file")])
    assert download(api, bucket, "file", tmp_path) == b"new and longer"
    assert api.bucket_info(bucket).total_files == 1


def test_sending_the_same_file_again_sends_no_content(
    api: HfApi, bucket: str, tmp_path: Path, request_hub: Ask
) -> None:
    content = random.Random(4).randbytes(4 * MEGABYTE)
    api.batch_bucket_files(bucket, add=[(content, "first")])
    before = stats(request_hub)
    api.batch_bucket_files(bucket, add=[(content, "second")])
    after = stats(request_hub)
    assert after["stored_bytes"] == before["stored_bytes"]
    assert after["received_bytes"] - before["received_bytes"] < 10_000  # a shard, no xorb
    assert after["deduplicated_bytes"] - before["deduplicated_bytes"] == len(content)


@pytest.mark.parametrize("global_dedup", ["true", "false"])
def test_a_client_with_an_empty_cache_sends_nothing_that_is_stored(
    api: HfApi, bucket: str, tmp_path: Path, hub: HubProcess, request_hub: Ask, global_dedup: str
) -> None:
    """By the answer to a dedup query, and without asking, by the answer that a xorb is already stored."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(f"cold {global_dedup}").randbytes(4 * MEGABYTE))
    api.batch_bucket_files(bucket, add=[(source, "first")])
    before = stats(request_hub)
    script = "api.batch_bucket_files(sys.argv[1], add=[(Path(sys.argv[2]), 'second')])"
    settings = {"HF_XET_DEDUPLICATION_GLOBAL_DEDUP_QUERY_ENABLED": global_dedup}
    run_client(tmp_path, hub.url, script, bucket, str(source), **settings)
    after = stats(request_hub)
    assert after["received_bytes"] - before["received_bytes"] < 10_000
    assert after["deduplicated_bytes"] - before["deduplicated_bytes"] == 4 * MEGABYTE
    assert download(api, bucket, "second", tmp_path) == source.read_bytes()


def test_a_small_edit_sends_a_small_part(api: HfApi, bucket: str, tmp_path: Path, request_hub: Ask) -> None:
    content = bytearray(random.Random(5).randbytes(8 * MEGABYTE))
    api.batch_bucket_files(bucket, add=[(bytes(content), "file")])
    before = stats(request_hub)
    content[4 * MEGABYTE : 4 * MEGABYTE] = b"inserted"
    api.batch_bucket_files(bucket, add=[(bytes(content), "file")])
    assert stats(request_hub)["received_bytes"] - before["received_bytes"] < MEGABYTE
    assert download(api, bucket, "file", tmp_path) == content


@pytest.mark.parametrize(
    "setting",
    [
        {"HF_XET_CLIENT_SHARD_API_VERSION": "1", "HF_XET_CLIENT_RECONSTRUCTION_API_VERSION": "1"},
        {"HF_XET_CLIENT_LEGACY_DIRECT_XORB_UPLOAD": "true"},
        {"HF_XET_CLIENT_ENABLE_MULTIRANGE_FETCHING": "true"},
    ],
    ids=["version 1", "direct upload", "several ranges at once"],
)
def test_the_older_and_rarer_ways_of_the_client_work_too(
    api: HfApi, bucket: str, tmp_path: Path, hub: HubProcess, setting: dict[str, str]
) -> None:
    """A file whose chunks lie in two xorbs in turn: fetching it needs many ranges."""
    script = """
import random
from collections.abc import Callable
bucket, folder = sys.argv[1], Path(sys.argv[2])
content = bytearray(random.Random(str(sys.argv)).randbytes(6_000_000))
api.batch_bucket_files(bucket, add=[(bytes(content), "file")])
for at in range(1_000_000, 6_000_000, 2_000_000):
    content[at : at + 1000] = bytes(1000)
api.batch_bucket_files(bucket, add=[(bytes(content), "file")])
api.download_bucket_files(bucket, [("file", folder / "copy")], raise_on_missing_files=True)
print((folder / "copy").read_bytes() == content)
"""
    assert run_client(tmp_path, hub.url, script, bucket, str(tmp_path), **setting) == "True\n"


def test_the_file_system_of_the_client_reads_whole_files_and_ranges(api: HfApi, bucket: str, hub: HubProcess) -> None:
    content = random.Random(6).randbytes(3 * MEGABYTE)
    api.batch_bucket_files(bucket, add=[(content, "deep/er/file"), (b"", "deep/empty")])
    files = HfFileSystem(endpoint=hub.url, token="hf_fake", skip_instance_cache=True)
    root = f"hf://buckets/{bucket}"
    assert files.cat(f"{root}/deep/er/file") == content
    assert files.info(f"{root}/deep/er/file")["size"] == len(content)
    assert [Path(name).name for name in files.ls(f"{root}/deep", detail=False)] == ["empty", "er"]
    with files.open(f"{root}/deep/er/file", "rb", block_size=100_000) as file:
        file.seek(1_234_567)
        assert file.read(777) == content[1_234_567:1_235_344]


def test_reading_a_range_over_plain_http_gives_exactly_those_bytes(api: HfApi, bucket: str, request_hub: Ask) -> None:
    content = random.Random(7).randbytes(MEGABYTE)
    api.batch_bucket_files(bucket, add=[(content, "a b/ü")])
    path = f"/buckets/{bucket}/resolve/a%20b%2F%C3%BC"
    for header, start, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=65535-65536", 65_535, 65_537),
        ("bytes=999990-5000000", 999_990, MEGABYTE),
        ("bytes=123456-", 123_456, MEGABYTE),
        ("bytes=-10", MEGABYTE - 10, MEGABYTE),
    ]:
        answer = request_hub("GET", path, headers={"Range": header})
        assert answer.status == 206
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{MEGABYTE}"
        assert answer.body == content[start:stop]
    whole = request_hub("GET", path)
    assert (whole.status, whole.body) == (200, content)
    beyond = request_hub("GET", path, headers={"Range": f"bytes={MEGABYTE}-"})
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{MEGABYTE}")
    head = request_hub("HEAD", path)
    assert (head.status, head.body, head.headers["x-linked-size"]) == (200, b"", str(MEGABYTE))
