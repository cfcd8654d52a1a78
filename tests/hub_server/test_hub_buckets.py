"""Buckets, batches and listings, as the unmodified Hub client sees them."""

import pytest
from hub_client import PAGE_SIZE
from huggingface_hub import HfApi
from huggingface_hub.errors import BucketBatchError, BucketNotFoundError, HfHubHTTPError, RepositoryNotFoundError


def paths(api: HfApi, bucket: str, prefix: str | None = None, *, recursive: bool = True) -> list[str]:
    return [item.path for item in api.list_bucket_tree(bucket, prefix, recursive=recursive)]


def test_a_bucket_is_created_described_listed_and_deleted(api: HfApi) -> None:
    url = api.create_bucket("me/life")
    assert url.bucket_id == "me/life"
    info = api.bucket_info("me/life")
    assert (info.id, info.private, info.size, info.total_files) == ("me/life", False, 0, 0)
    assert [found.id for found in api.list_buckets(search="lif")] == ["me/life"]
    assert list(api.list_buckets(namespace="somebody-else")) == []
    api.delete_bucket("me/life")
    with pytest.raises(BucketNotFoundError):
        api.bucket_info("me/life")


def test_any_namespace_is_accepted_and_a_name_without_one_is_mine(api: HfApi) -> None:
    assert api.create_bucket("an-organisation/weights").bucket_id == "an-organisation/weights"
    assert api.create_bucket("plain").bucket_id == "me/plain"
    api.delete_bucket("an-organisation/weights")
    api.delete_bucket("me/plain")


def test_creating_a_bucket_twice_is_refused_unless_that_is_fine(api: HfApi, bucket: str) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_bucket(bucket)
    assert refused.value.response.status_code == 409
    assert api.create_bucket(bucket, exist_ok=True).bucket_id == bucket


def test_a_bucket_that_is_not_there_is_named_so_by_every_call(api: HfApi) -> None:
    for call in [
        lambda: api.bucket_info("me/nowhere"),
        lambda: api.delete_bucket("me/nowhere"),
        lambda: list(api.list_bucket_tree("me/nowhere")),
        lambda: list(api.get_bucket_paths_info("me/nowhere", ["a"])),
        lambda: api.batch_bucket_files("me/nowhere", delete=["a"]),
    ]:
        with pytest.raises(BucketNotFoundError):
            call()
    with pytest.raises(RepositoryNotFoundError):  # outside /api the client does not know it was about a bucket
        api.get_bucket_file_metadata("me/nowhere", "a")
    api.delete_bucket("me/nowhere", missing_ok=True)


def test_a_deleted_bucket_made_again_is_empty(api: HfApi, bucket: str) -> None:
    api.batch_bucket_files(bucket, add=[(b"x", "file")])
    api.delete_bucket(bucket)
    api.create_bucket(bucket)
    assert paths(api, bucket) == []


def test_a_batch_does_what_it_can_and_names_what_it_cannot(api: HfApi, bucket: str) -> None:
    with pytest.raises(BucketBatchError) as failed:
        api.batch_bucket_files(
            bucket,
            add=[(b"x", "kept")],
            copy=[("bucket", bucket, "ab" * 32, "copied-from-nothing")],
            delete=["never-was"],
        )
    assert [failure["path"] for failure in failed.value.failures] == ["copied-from-nothing", "never-was"]
    assert paths(api, bucket) == ["kept"]
    with pytest.raises(BucketBatchError):
        api.batch_bucket_files(bucket, delete=["never-was"])


def test_a_copy_is_made_without_sending_the_content(api: HfApi, bucket: str) -> None:
    api.batch_bucket_files(bucket, add=[(b"content", "original")])
    api.copy_files(f"hf://buckets/{bucket}/original", f"hf://buckets/{bucket}/folder/copy")
    original, copy = api.get_bucket_paths_info(bucket, ["original", "folder/copy"])
    assert (copy.size, copy.xet_hash) == (original.size, original.xet_hash)


def test_a_delete_removes_exactly_its_path(api: HfApi, bucket: str) -> None:
    api.batch_bucket_files(bucket, add=[(b"1", "a"), (b"2", "a.b"), (b"3", "ab/c")])
    api.batch_bucket_files(bucket, delete=["a"])
    assert paths(api, bucket) == ["a.b", "ab/c"]
    assert api.bucket_info(bucket).size == 2


def test_paths_info_tells_of_files_and_leaves_out_what_is_not_there(api: HfApi, bucket: str) -> None:
    api.batch_bucket_files(bucket, add=[(b"123", "dir/file")])
    assert [(info.path, info.size) for info in api.get_bucket_paths_info(bucket, ["x", "dir/file", "dir", "/"])] == [
        ("dir/file", 3)
    ]
    assert api.get_bucket_file_metadata(bucket, "dir/file").size == 3


def test_a_listing_of_several_pages_is_complete_and_in_order(api: HfApi, bucket: str) -> None:
    names = [f"{folder}/{number:02d}" for folder in "abc" for number in range(PAGE_SIZE)]
    api.batch_bucket_files(bucket, add=[(name.encode(), name) for name in [*names, "top"]])
    assert paths(api, bucket) == [*names, "top"]
    assert paths(api, bucket, "b/") == names[PAGE_SIZE : 2 * PAGE_SIZE]
    assert paths(api, bucket, recursive=False) == ["a", "b", "c", "top"]


def test_a_flat_listing_of_several_pages_names_each_folder_once(api: HfApi, bucket: str) -> None:
    folders = [f"folder-{number:02d}" for number in range(2 * PAGE_SIZE + 3)]
    files = [f"{folder}/{name}" for folder in folders for name in ("one", "two")]
    api.batch_bucket_files(bucket, add=[(name.encode(), name) for name in files])
    found = list(api.list_bucket_tree(bucket))
    assert [item.path for item in found] == folders
    assert {item.type for item in found} == {"directory"}


def test_a_prefix_is_letters_not_a_folder(api: HfApi, bucket: str) -> None:
    names = ["runs/log", "runs/log/a", "runs/log/b/c", "runs/log2/d", "runs/logs.json", "runs/other"]
    api.batch_bucket_files(bucket, add=[(name.encode(), name) for name in names])
    assert paths(api, bucket, "runs/log") == sorted(names[:-1])
    assert paths(api, bucket, "runs/log", recursive=False) == [
        *("runs/log", "runs/log/a", "runs/log/b", "runs/log2", "runs/logs.json")
    ]
    assert paths(api, bucket, "runs/log/", recursive=False) == ["runs/log/a", "runs/log/b"]
    assert paths(api, bucket, "nothing") == []


def test_more_than_a_thousand_operations_go_through_in_several_batches(api: HfApi, bucket: str) -> None:
    api.batch_bucket_files(bucket, add=[(b"same", f"{number:04d}") for number in range(1001)])
    assert api.bucket_info(bucket).total_files == 1001


def test_who_am_i_is_the_local_user(api: HfApi) -> None:
    assert api.whoami()["name"] == "me"
