"""A Hub bucket: the real client against the embedded server, and against one that refuses everything."""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from programs import program

pytest.importorskip("huggingface_hub", reason="the hub bucket needs the extra deltawire[hub]")
pytest.importorskip("starlette", reason="the embedded bucket server needs the extra deltawire[server]")

import httpx2
import huggingface_hub
from huggingface_hub.errors import BucketBatchError
from runs import PATIENCE, model, publishing, read_weights, served

from deltawire.buckets import Bucket, open_bucket
from deltawire.buckets.conformance import BucketTests
from deltawire.buckets.verified import download_verified
from deltawire.errors import AccessRefused, BadDigest, BadUrl, BucketError, NotFound, OutOfSpace, Unavailable
from deltawire.hub_server import HubServer
from deltawire.weights.tensors import equal

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """A client with a cache of its own, which gives up on a dead server within a second."""
    folder = tmp_path_factory.mktemp("client")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HOME", str(folder))
        patch.setenv("HF_XET_CACHE", str(folder / "xet"))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "50ms")
        patch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
        yield patch


@pytest.fixture(scope="module")
def hub(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket server, which HF_ENDPOINT names."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        environment.setenv("HF_ENDPOINT", server.url)
        yield server.url


@pytest.fixture
def bucket(hub: str) -> Bucket:
    return open_bucket(f"hf://buckets/me/{uuid.uuid4().hex}", create=True)


class TestHubBucket(BucketTests):
    @pytest.fixture
    def bucket(self, hub: str) -> Bucket:
        return open_bucket(f"hf://buckets/me/{uuid.uuid4().hex}", create=True)


def test_a_prefix_follows_the_name_of_the_bucket(bucket: Bucket) -> None:
    open_bucket(f"{bucket.url}/wordle/run-7").put("HEAD.json", b"{}")
    assert bucket.get("wordle/run-7/HEAD.json", limit=2) == b"{}"
    assert [stat.key for stat in open_bucket(f"{bucket.url}/wordle").list()] == ["run-7/HEAD.json"]


def test_listing_more_than_a_page(bucket: Bucket, tmp_path: Path) -> None:
    keys = [f"replicas/{number:03d}.json" for number in range(30)]
    with HubServer(tmp_path / "short pages", page_size=7) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        short_pages = open_bucket("hf://buckets/me/short-pages", create=True)
        for key in keys:
            short_pages.put(key, b"")
        assert [stat.key for stat in short_pages.list("replicas/")] == keys


def test_the_endpoint_is_that_of_the_moment_of_opening(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("key", b"here")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert bucket.get("key", limit=4) == b"here"
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:1"):
        open_bucket(bucket.url, create=True)


def test_creating_a_bucket_that_exists_opens_it(bucket: Bucket) -> None:
    bucket.put("key", b"kept")
    assert open_bucket(bucket.url, create=True).get("key", limit=4) == b"kept"


def test_a_bucket_that_is_not_there_is_not_found_and_the_error_says_how_to_make_it(hub: str, tmp_path: Path) -> None:
    missing = open_bucket("hf://buckets/me/missing")
    for verb in (
        lambda: missing.stat("key"),
        lambda: missing.get("key", limit=1),
        lambda: missing.get_file("key", tmp_path / "out", limit=1),
        lambda: missing.put("key", b"x"),
        lambda: missing.put_new("key", b"x"),
        lambda: list(missing.list()),
        lambda: missing.delete("key"),
    ):
        with pytest.raises(NotFound, match="hf buckets create me/missing"):
            verb()


def test_a_loopback_server_may_be_asked_often_and_the_hub_seldom(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bucket.poll_seconds == 0.5
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    assert open_bucket("hf://buckets/me/run").poll_seconds == 5.0
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1]:8080/")
    assert open_bucket("hf://buckets/me/run").poll_seconds == 0.5


@pytest.mark.parametrize("endpoint", [f"http://user:{TOKEN}@127.0.0.1:1", "127.0.0.1:8080"])
def test_an_endpoint_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(BadUrl, match="HF_ENDPOINT") as refusal:
        open_bucket("hf://buckets/me/run")
    assert TOKEN not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["hf://me/run", "hf://buckets/me", "hf://buckets//run", "hf://datasets/me/run", "hf://buckets/../x"]
)
def test_an_address_that_names_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(BadUrl, match="hf://buckets/namespace/name"):
        open_bucket(url)


def test_a_download_that_breaks_off_leaves_the_old_file(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("key", b"123456")
    out = tmp_path / "out"
    out.write_bytes(b"old")

    def break_off(bucket_id: str, files: list[tuple[object, Path]]) -> None:
        files[0][1].write_bytes(b"123")
        raise RuntimeError("Task error: File reconstruction error")

    monkeypatch.setattr(bucket._api, "download_bucket_files", break_off)
    with pytest.raises(Unavailable, match=r"key.*Task error"):
        bucket.get_file("key", out, limit=6)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"old")]


def test_a_full_disk_under_a_download_is_out_of_space_and_the_old_file_stays(bucket: Bucket, tiny_disk: Path) -> None:
    bucket.put("key", os.urandom(2 << 20))
    (tiny_disk / "out").write_bytes(b"old")
    with pytest.raises(OutOfSpace, match=str(tiny_disk / "out")):
        bucket.get_file("key", tiny_disk / "out", limit=2 << 20)
    assert [(path.name, path.read_bytes()) for path in tiny_disk.iterdir()] == [("out", b"old")]


def test_nothing_is_printed(bucket: Bucket, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bucket.put("key", os.urandom(2 << 20))
    bucket.get_file("key", tmp_path / "out", limit=2 << 20)
    assert capfd.readouterr() == ("", "")


def test_a_flipped_bit_that_the_client_does_not_notice_is_noticed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("key", b"123456")

    def flip(bucket_id: str, files: list[tuple[object, Path]]) -> None:
        files[0][1].write_bytes(b"123457")

    monkeypatch.setattr(bucket._api, "download_bucket_files", flip)
    with pytest.raises(BadDigest, match="key"):
        download_verified(bucket, "key", tmp_path / "out", size=6, blake3="0" * 64)
    assert list(tmp_path.iterdir()) == []


# The client in trouble


def failing(monkeypatch: pytest.MonkeyPatch, bucket: Bucket, error: Exception, *, times: int = 1) -> list[int]:
    """The first uploads fail as told; how many were tried."""
    really, tried = bucket._api.batch_bucket_files, []

    def batch(*given: object, **more: object) -> object:
        tried.append(len(tried))
        if len(tried) <= times:
            raise error
        return really(*given, **more)

    monkeypatch.setattr(bucket._api, "batch_bucket_files", batch)
    return tried


def batch_error(*reasons: str) -> BucketBatchError:
    """What the client raises for a batch of which some paths failed."""
    response = httpx2.Response(422, request=httpx2.Request("POST", "http://127.0.0.1/api/buckets/me/run/batch"))
    error = BucketBatchError("1 of 2 operations failed", response=response)
    error.failures = [{"path": f"deltas/{number}", "error": reason} for number, reason in enumerate(reasons)]
    return error


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize(
    "error",
    [
        batch_error("internal error"),
        batch_error(),
        AttributeError("'NoneType' object has no attribute 'request'"),
        RuntimeError("Task error: connection reset"),
        KeyError("xetHash"),
    ],
    ids=["failed paths", "no reason", "AttributeError", "RuntimeError", "KeyError"],
)
def test_a_trainer_outlives_what_passes(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tried = failing(monkeypatch, bucket, error, times=2)
    with publishing(bucket) as publisher:
        publisher.publish(model())
        publisher.flush(PATIENCE)
    assert len(tried) > 4
    assert equal(read_weights(bucket), served(model()))


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("storage quota exceeded", OutOfSpace),
        ("Forbidden: you may not write here", AccessRefused),
        ("invalid path", BucketError),
        ("no file with this xetHash was uploaded", Unavailable),
    ],
)
def test_the_reason_of_a_failed_path_says_whether_it_stays(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, reason: str, kind: type[BucketError]
) -> None:
    failing(monkeypatch, bucket, batch_error("try again", reason))
    with pytest.raises(kind, match="key") as refusal:
        bucket.put("key", b"1")
    assert type(refusal.value) is kind


def test_a_wrong_call_of_the_client_is_final_and_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, bucket, TypeError("batch_bucket_files() got an unexpected keyword argument"))
    with pytest.raises(BucketError, match=r"key.*TypeError: batch_bucket_files") as refusal:
        bucket.put("key", b"1")
    assert not isinstance(refusal.value, Unavailable)


@pytest.mark.parametrize("variable", ["HF_XET_CACHE", "HF_HOME"])
def test_a_cache_folder_that_cannot_be_used_is_named_with_the_variable_that_moves_it(
    bucket: Bucket, tmp_path: Path, variable: str
) -> None:
    (tmp_path / "file").touch()
    setting = {"HF_HOME": str(tmp_path), variable: str(tmp_path / "file" / "cache")}
    clean = {name: value for name, value in os.environ.items() if name != "HF_XET_CACHE"}
    done = subprocess.run(
        [sys.executable, program("put_refused"), bucket.url],
        env=clean | setting,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    kind, _, said = done.stdout.splitlines()[-1].partition(" ")  # hf_xet prints a line of its own
    assert kind == "BucketError", done
    assert str(tmp_path / "file" / "cache") in said
    assert variable in said


@pytest.mark.parametrize("variables", [("HTTP_PROXY", "http_proxy"), ("ALL_PROXY",)])
def test_a_server_on_loopback_is_never_asked_through_a_proxy(
    hub: str, monkeypatch: pytest.MonkeyPatch, variables: tuple[str, ...]
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    for name in variables:
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    huggingface_hub.close_session()
    open_bucket(bucket_url := f"hf://buckets/me/{uuid.uuid4().hex}", create=True).put("key", os.urandom(100_000))
    assert open_bucket(bucket_url).stat("key").size == 100_000


def test_a_proxy_in_the_way_is_named_without_its_password(
    environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:1")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    huggingface_hub.close_session()
    with pytest.raises(Unavailable, match=r"through the proxy 127\.0\.0\.1:1 that HTTP_PROXY names") as refusal:
        open_bucket("hf://buckets/me/run", create=True)
    huggingface_hub.close_session()
    assert "secret" not in str(refusal.value)


class _Refusal(BaseHTTPRequestHandler):
    status = 0

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def refusing(environment: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers every request with one status."""
    handler = type("Refusal", (_Refusal,), {"status": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        patch.setenv("HF_ENDPOINT", url)
        yield url
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("refusing", [401, 403], indirect=True)
def test_a_refused_token_names_the_endpoint_and_never_the_token(refusing: str, tmp_path: Path) -> None:
    bucket = open_bucket("hf://buckets/me/run")
    for verb in (
        lambda: bucket.stat("key"),
        lambda: bucket.get_file("key", tmp_path / "out", limit=1),
        lambda: bucket.put("key", b"x"),
        lambda: list(bucket.list()),
        lambda: bucket.delete("key"),
        lambda: open_bucket("hf://buckets/me/run", create=True),
    ):
        with pytest.raises(AccessRefused, match=refusing) as refusal:
            verb()
        assert ("may not" in str(refusal.value)) == ("403" in str(refusal.value))
        assert "HF_TOKEN" in str(refusal.value)
        assert TOKEN not in f"{refusal.value!r} {refusal.value.__cause__!r} {bucket!r}"


@pytest.mark.parametrize("refusing", [401], indirect=True)
def test_without_a_token_the_refusal_says_that_none_is_set(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(AccessRefused, match=r"no token is set.*hf auth login"):
        open_bucket("hf://buckets/me/run", create=True)


@pytest.mark.parametrize(
    ("refusing", "kind"),
    [
        (408, Unavailable),
        (429, Unavailable),
        (500, Unavailable),
        (503, Unavailable),
        (501, BucketError),
        (507, OutOfSpace),
        (400, BucketError),
    ],
    indirect=["refusing"],
)
def test_only_what_may_pass_is_unavailable(refusing: str, kind: type[BucketError]) -> None:
    with pytest.raises(kind) as refusal:
        open_bucket("hf://buckets/me/run", create=True)
    assert type(refusal.value) is kind


def test_without_the_client_one_sentence_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from deltawire.buckets import open_bucket\n"
        "open_bucket('memory://still-works')\n"
        "open_bucket('hf://buckets/me/run')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: the hub bucket needs huggingface_hub: pip install 'deltawire[hub]'"
    )
