"""A Hugging Face Bucket (`hf://buckets/namespace/name`), on the Hub or on any server HF_ENDPOINT names.

A bucket batch is not transactional and the client verifies nothing it downloads: see `deltawire.buckets.verified`.
While a server is down hf_xet insists for about 4.5 minutes before an upload fails (measured with 1.8.0);
HF_XET_CLIENT_RETRY_BASE_DELAY=200ms in the environment makes that seconds.
"""

import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

try:
    import hf_xet
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, close_session, constants, get_token
    from huggingface_hub.errors import (
        BucketBatchError,
        BucketNotFoundError,
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
    )
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status
except ImportError:
    raise ImportError("the hub bucket needs huggingface_hub: pip install 'deltawire[hub]'") from None

from deltawire.buckets.addresses import is_loopback, parts_of
from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import Listing, Stat, check_key, check_prefix, is_key, look_then_put, watch_by_polling
from deltawire.buckets.hub_refusals import batch_refusal, local_refusal
from deltawire.buckets.proxies import proxy_note, spare_loopback
from deltawire.buckets.refusals import first_line, from_anything, is_later
from deltawire.errors import (
    AccessRefused,
    BadUrl,
    BucketError,
    DeltaWireError,
    NotFound,
    OutOfSpace,
    TooLarge,
    Unavailable,
)

Right = Literal["read", "write"]


class HubBucket:
    """The files of one bucket. `put_new` is stat-then-put: the Hub's own API has no conditional write.

    Its S3 gateway has one: `s3://name` with AWS_ENDPOINT_URL=https://s3.hf.co/namespace is the same bucket, fenced.
    """

    conditional_writes = False

    def __init__(self, bucket_id: str, *, endpoint: str) -> None:
        self.url = f"hf://buckets/{bucket_id}"
        self.endpoint = endpoint
        self.poll_seconds = 0.5 if is_loopback(endpoint) else 5.0
        self._through = proxy_note(endpoint)
        self._id = bucket_id
        self._api = HfApi(endpoint=endpoint, library_name="deltawire")
        self._exists = False
        self._feed: _Feed | None = None

    def __repr__(self) -> str:
        return f"<bucket {self.url} at {self.endpoint}>"

    def create(self) -> None:
        """Make the bucket, private, unless it is there."""
        with self._errors("", "write"):
            self._api.create_bucket(self._id, private=True, exist_ok=True)

    def stat(self, key: str) -> Stat:
        return _stat(self._info(key))

    def get(self, key: str, *, limit: int) -> bytes:
        with tempfile.TemporaryDirectory(prefix="deltawire-") as folder:
            path = Path(folder, "object")
            self.get_file(key, path, limit=limit)
            return path.read_bytes()

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        info = self._info(key)
        if info.size > limit:
            raise TooLarge(f"{self.url}/{key} is {info.size:,} bytes, more than the {limit:,} allowed here")
        with replacing(path) as temporary:
            temporary.touch()  # here, a folder that refuses is an error of its own; to hf_xet it is a failed task
            try:
                with self._errors(key, "read"):
                    # Given `info` and not the key, the client fetches this content even if the key changes meanwhile.
                    self._api.download_bucket_files(self._id, [(info, temporary)])
            except (Unavailable, OutOfSpace):
                # hf_xet reports a full disk as one more failed task: ask the disk.
                written = temporary.stat().st_size if temporary.exists() else 0
                if shutil.disk_usage(path.parent).free < info.size - written:
                    raise OutOfSpace(f"{path}: no space left for {info.size:,} bytes of {self.url}/{key}") from None
                raise
            if temporary.stat().st_size != info.size:
                raise Unavailable(f"{self.url}/{key}: the download stopped before its {info.size:,} bytes")

    def put(self, key: str, data: bytes | Path) -> None:
        check_key(key)
        if isinstance(data, Path):
            data.open("rb").close()  # a source that cannot be read is the caller's OSError, not the bucket's
        with self._errors(key, "write"):
            self._api.batch_bucket_files(self._id, add=[(data, key)])

    def put_new(self, key: str, data: bytes | Path) -> None:
        look_then_put(self, key, data)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        check_prefix(prefix)
        with self._errors(prefix, "read"):
            try:
                folder = prefix.rpartition("/")[0] or None
                listed = self._api.list_bucket_tree(self._id, folder, recursive=True)
                files = [*Listing(f"{self.url}/{prefix}").count(listed)]
            except RemoteEntryNotFoundError:  # no such folder
                files = []
        mine = (_stat(file) for file in files if file.type == "file" and file.path.startswith(prefix))
        return iter(sorted(filter(lambda stat: stat.key > after and is_key(stat.key), mine), key=lambda stat: stat.key))

    def delete(self, *keys: str) -> None:
        for key in keys:
            check_key(key)
        if not keys:
            return
        with self._errors(keys[0], "write"):
            try:
                self._api.batch_bucket_files(self._id, delete=[*keys])
            except BucketBatchError as error:
                # Deleting what is gone may be reported as a failure; so is the second sending of a retried batch.
                if [*self._api.get_bucket_paths_info(self._id, [failure["path"] for failure in error.failures])]:
                    raise

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        """Poll, and look at once when the Hub's feed of changes says that something happened in the bucket."""
        return watch_by_polling(self, key, tag=tag, timeout=timeout, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        """Sleep, or until something changes; the feed of a bucket nobody made yet would be given up for good."""
        if self._feed is None and self._exists:
            self._feed = _Feed(self._id, self.endpoint)
        if self._feed is None:
            time.sleep(seconds)
        else:
            self._feed.wait(seconds)

    def _info(self, key: str) -> Any:
        check_key(key)
        with self._errors(key, "read"):
            found = [*self._api.get_bucket_paths_info(self._id, [key])]
        self._exists = True
        if not found:
            raise NotFound(f"{self.url}/{key}: no such object")
        return found[0]

    @contextmanager
    def _errors(self, key: str, right: Right) -> Iterator[None]:
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except DeltaWireError:
            raise
        except HTTPError as error:
            raise self._from_hub(where, error, right) from error
        except (hf_xet.XetAuthenticationError, LocalTokenNotFoundError) as error:
            raise self._refused(where, 401, right) from error
        except OfflineModeIsEnabled as error:
            raise BucketError(f"{where}: HF_HUB_OFFLINE is set; unset it to reach {self.endpoint}") from error
        except hf_xet.XetObjectNotFoundError as error:
            raise NotFound(f"{where}: {first_line(error)}") from error
        except ValueError as error:
            raise BucketError(f"{where}: {first_line(error)}") from error
        except Exception as error:
            raise self._from_client(where, error, right) from error

    def _from_client(self, where: str, error: Exception, right: Right) -> BucketError:
        """What is left may be anything: hf_xet says ConnectionError or RuntimeError alike for a dead server, a refused
        token and a missing bucket, and threads of huggingface_hub that meet in an outage raise an AttributeError."""
        if local := local_refusal(where, error):
            return local
        if refused := self._ask_for_token(where, right):
            return refused
        if not isinstance(error, OSError | RuntimeError):
            return from_anything(f"{where} at {self.endpoint}", error)
        return Unavailable(f"{where} at {self.endpoint}{self._through}: {first_line(error)}")

    def _ask_for_token(self, where: str, right: Right) -> BucketError | None:
        """Ask the endpoint for what hf_xet needs first: its plain answer, if that is a refusal."""
        try:
            url = f"{self.endpoint}/api/buckets/{self._id}/xet-{right}-token"
            hf_raise_for_status(get_session().get(url, headers=build_hf_headers(library_name="deltawire")))
        except HTTPError as error:
            return self._from_hub(where, error, right)
        except Exception:  # the client in trouble again: the first error says more
            return None
        return None

    def _from_hub(self, where: str, error: HTTPError, right: Right) -> BucketError:
        if not isinstance(error, HfHubHTTPError):
            said = first_line(error) or type(error).__name__
            return Unavailable(f"{where}: no answer from {self.endpoint}{self._through}: {said}")
        if isinstance(error, BucketBatchError):
            return batch_refusal(f"{where} at {self.endpoint}", error.failures)
        if isinstance(error, RemoteEntryNotFoundError):
            return NotFound(f"{where}: no such object")
        return self._from_status(where, error.response.status_code, error, right)

    def _from_status(self, where: str, status: int, error: HfHubHTTPError, right: Right) -> BucketError:
        if isinstance(error, BucketNotFoundError) or status == 404:
            return NotFound(f"{self.url}: no such bucket at {self.endpoint}; run `hf buckets create {self._id}`")
        if status in (401, 403):
            return self._refused(where, status, right)
        if status == 507:
            return OutOfSpace(f"{where}: {self.endpoint} has no space left")
        kind = Unavailable if is_later(status) else BucketError
        return kind(f"{where} at {self.endpoint}{self._through}: {first_line(error)}")

    def _refused(self, where: str, status: int, right: Right) -> AccessRefused:
        if status == 403:
            why = f"knows the token, which may not {right} here (HTTP 403); give it that right, or set another HF_TOKEN"
        elif get_token():
            why = "refused the token (HTTP 401): it is wrong or expired; run `hf auth login` or set HF_TOKEN"
        else:
            why = "refused (HTTP 401), and no token is set; run `hf auth login` or set HF_TOKEN"
        return AccessRefused(f"{where}: {self.endpoint} {why}")


class _Feed:
    """Wakes a waiter when a bucket changes, while the client can follow the Hub's feed; else it just waits.

    The client keeps the feed's reader to itself so far; a client without it, or a server without a feed, is polled.
    """

    def __init__(self, bucket_id: str, endpoint: str) -> None:
        self._changed = threading.Event()
        try:
            from huggingface_hub._bucket_live_follow import BucketFollower
        except ImportError:
            return
        alive, changed = weakref.ref(self), self._changed
        logging.getLogger(BucketFollower.__module__).setLevel(logging.ERROR)  # without a feed, polling is all there is
        BucketFollower(
            endpoint=endpoint,
            bucket_id=bucket_id,
            on_changes=lambda changes: changed.set(),
            on_reconcile=changed.set,
            is_alive=lambda: alive() is not None,
        ).start()

    def wait(self, seconds: float) -> None:
        """Return after some time, or when something changed."""
        self._changed.wait(seconds)
        self._changed.clear()


def open_hub(bucket_id: str, *, create: bool) -> HubBucket:
    """The bucket `namespace/name` at HF_ENDPOINT as it is now; the client itself would keep the value of its import.

    Turns the client's progress bars off, for the whole process, unless HF_HUB_DISABLE_PROGRESS_BARS is set.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if "@" in endpoint:
        raise BadUrl("HF_ENDPOINT has an '@': put the token into HF_TOKEN, not into the address")
    if parts_of(endpoint).scheme not in ("http", "https"):
        raise BadUrl(f"HF_ENDPOINT is {endpoint}: not an address that starts with http:// or https://")
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    if spare_loopback(endpoint):
        close_session()  # one that was made before goes on through the proxy
    bucket = HubBucket(bucket_id, endpoint=endpoint)
    if create:
        bucket.create()
    return bucket


def _stat(info: Any) -> Stat:
    written = info.uploaded_at or info.mtime
    return Stat(info.path, info.size, info.xet_hash, written.timestamp() if written else 0.0)
