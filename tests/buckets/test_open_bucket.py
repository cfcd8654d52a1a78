"""From an address to a bucket, and the addresses that are refused."""

from pathlib import Path

import pytest

from deltawire.buckets import check_key, open_bucket
from deltawire.errors import BadUrl, FormatError

SECRET = "AKIASECRETSECRET"


def test_a_folder_is_named_by_its_uri(tmp_path: Path) -> None:
    folder = tmp_path / "späße & 100%"
    folder.mkdir()
    bucket = open_bucket(folder.as_uri())
    bucket.put("key", b"x")
    assert (folder / "key").read_bytes() == b"x"
    assert open_bucket(bucket.url).get("key", limit=1) == b"x"


@pytest.mark.parametrize("form", ["{}", "./x & 100%", "x/../../here/./x & 100%", "~/x & 100%"])
def test_a_plain_path_is_a_folder_and_its_url_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    written = form.format(here / "x & 100%").replace("x/..", "./x/..")
    bucket = open_bucket(written, create=True)
    bucket.put("key", b"x")
    assert (here / "x & 100%/key").read_bytes() == b"x"
    assert bucket.url.startswith("file:///")
    assert open_bucket(bucket.url).get("key", limit=1) == b"x"


def test_opening_a_folder_writes_nothing(tmp_path: Path) -> None:
    open_bucket((tmp_path / "bucket").as_uri())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["memory://prefixed/wordle/run-7", "memory://prefixed/wordle/run-7/"])
def test_what_follows_the_name_is_a_prefix_and_part_of_the_url(url: str) -> None:
    bucket = open_bucket(url)
    bucket.put("HEAD.json", b"{}")
    assert bucket.url == "memory://prefixed/wordle/run-7"
    assert open_bucket("memory://prefixed").get("wordle/run-7/HEAD.json", limit=2) == b"{}"


def test_cloud_stores_open_without_being_asked_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    for url in ("s3://bucket", "s3://bucket/run-7", "gs://bucket/run-7", "az://container/run-7"):
        bucket = open_bucket(url)
        assert bucket.url == url
        assert bucket.conditional_writes
        assert SECRET not in repr(bucket)


def test_a_store_whose_settings_are_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadUrl, match=r"az://container: .*Account must be specified"):
        open_bucket("az://container")


@pytest.mark.parametrize(
    "url",
    ["ftp://host/folder", "plain/folder", "wordle", "", "https://huggingface.co/x", "s3:/x", "flie:///x", ".hidden"],
)
def test_an_unknown_scheme_is_refused_with_the_known_ones(url: str) -> None:
    with pytest.raises(BadUrl) as refusal:
        open_bucket(url)
    for known in ("file:///", "memory://", "s3://", "gs://", "az://", "hf://buckets/"):
        assert known in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/prefix",
        f"s3://key:{SECRET}/{SECRET}@bucket",
        f"s3:/key:{SECRET}@bucket",
        f"hf://user:{SECRET}@buckets/me/run",
        f"file://user:{SECRET}@host/folder",
        f"az://container/run?sig={SECRET}",
        f"memory://name#{SECRET}",
        f"ftp://{SECRET}@host",
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(BadUrl) as refusal:
        open_bucket(url)
    assert SECRET not in f"{refusal.value!r} {refusal.value.__cause__!r} {refusal.value.__context__!r}"


@pytest.mark.parametrize(
    "url",
    [
        "file://relative/folder",
        "file://",
        "file:///",
        "s3://",
        "gs:///prefix",
        "memory://name/a//b",
        "s3://bucket/../other",
    ],
)
def test_an_incomplete_or_unsafe_address_is_refused(url: str) -> None:
    with pytest.raises(BadUrl):
        open_bucket(url)


@pytest.mark.parametrize(
    "key", ["a", "runs/a1/commits/000001.json", "…", ".hidden", "a..b", "x" * 255, "x/" * 511 + "xy"]
)
def test_ordinary_keys_are_safe(key: str) -> None:
    check_key(key)


@pytest.mark.parametrize("key", ["é" * 128, "x/" * 512 + "x", "a/../../b", "\x85"])
def test_a_key_is_measured_in_bytes_and_named_when_refused(key: str) -> None:
    with pytest.raises(FormatError, match="unsafe key"):
        check_key(key)
