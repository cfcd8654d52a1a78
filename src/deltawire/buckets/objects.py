"""Object stores and memory as buckets (`s3://`, `gs://`, `az://`, `memory://`), all through obstore."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore import exceptions, store

from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import Stat, check_key, check_prefix, is_key, watch_by_polling
from deltawire.errors import AccessRefused, AlreadyExists, BadUrl, BucketError, NotFound, TooLarge, Unavailable

# obstore's own retries would hold a caller for three minutes; deltawire.buckets.Retry decides how long to insist.
_QUICK_RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=15)}
CLOUDS: dict[str, Any] = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
_REFUSED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


class ObjectBucket:
    """The objects of one obstore store. Its conditional put is atomic on every store opened here.

    `put_new` sends one request, so it carries at most what the store takes in one: 5 GB on S3.
    """

    conditional_writes = True

    def __init__(self, url: str, objects: Any, *, poll_seconds: float) -> None:
        self.url = url
        self.poll_seconds = poll_seconds
        self._objects = objects

    def __repr__(self) -> str:
        return f"<bucket {self.url}>"

    def stat(self, key: str) -> Stat:
        check_key(key)
        with self._errors(key):
            return _stat(obstore.head(self._objects, key))

    def get(self, key: str, *, limit: int) -> bytes:
        check_key(key)
        with self._errors(key):
            return bytes(self._open(key, limit).bytes())

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        check_key(key)
        with self._errors(key):
            found = self._open(key, limit)
        with replacing(path) as temporary, open(temporary, "xb") as file:
            for chunk in self._chunks(found, key):
                file.write(chunk)

    def put(self, key: str, data: bytes | Path) -> None:
        self._write(key, data, "overwrite")

    def put_new(self, key: str, data: bytes | Path) -> None:
        self._write(key, data, "create")

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        check_prefix(prefix)
        # obstore's prefix is whole path segments ("runs/a" does not find "runs/a1"): ask for the folder, then sift.
        folder = prefix.rpartition("/")[0] or None
        with self._errors(prefix):
            batches = obstore.list(self._objects, folder, offset=after or None)
            found = [_stat(meta) for batch in batches for meta in batch]
        mine = (stat for stat in found if stat.key.startswith(prefix) and stat.key > after and is_key(stat.key))
        return iter(sorted(mine, key=lambda stat: stat.key))

    def delete(self, *keys: str) -> None:
        for key in keys:
            check_key(key)
        if keys:
            with self._errors(keys[0]):
                obstore.delete(self._objects, list(keys))

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)

    def _write(self, key: str, data: bytes | Path, mode: Any) -> None:
        check_key(key)
        if isinstance(data, Path):
            with open(data, "rb") as file, self._errors(key):
                obstore.put(self._objects, key, file, mode=mode)
        else:
            with self._errors(key):
                obstore.put(self._objects, key, data, mode=mode)

    def _open(self, key: str, limit: int) -> Any:
        found = obstore.get(self._objects, key)
        size = found.meta["size"]
        if size > limit:
            raise TooLarge(f"{self.url}/{key} is {size:,} bytes, more than the {limit:,} allowed here")
        return found

    def _chunks(self, found: Any, key: str) -> Iterator[Any]:
        """What arrives, in order; the store's errors are named here so that they are not taken for the disk's."""
        with self._errors(key):
            yield from found.stream()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{where}: no such object (or no such bucket)") from error
        except exceptions.AlreadyExistsError as error:
            raise AlreadyExists(f"{where} exists already") from error
        except _REFUSED as error:
            raise AccessRefused(f"{where}: the store refused these credentials: {_first_line(error)}") from error
        except exceptions.GenericError as error:
            # obstore has no class for "no answer"; what it does have classes for are the answers that are final.
            raise Unavailable(f"{where}: {_first_line(error)}") from error
        except (exceptions.BaseError, ValueError) as error:
            raise BucketError(f"{where}: {_first_line(error)}") from error


def open_memory(name: str) -> ObjectBucket:
    """The memory bucket of that name: the same objects for every caller in this process."""
    return ObjectBucket(f"memory://{name}", _memories.setdefault(name, store.MemoryStore()), poll_seconds=0.5)


def open_cloud(scheme: str, name: str) -> ObjectBucket:
    """The S3 or GCS bucket or Azure container `name`; account, keys and endpoint come from the environment.

    Raises BadUrl if the environment lacks what this store needs.
    """
    url = f"{scheme}://{name}"
    try:
        # The clouds' own addresses are https; plain http is only what an AWS_ENDPOINT_URL names, as for boto3.
        objects = CLOUDS[scheme](name, retry_config=_QUICK_RETRIES, allow_http=True)
    except (exceptions.BaseError, ValueError) as error:
        raise BadUrl(f"{url}: {_first_line(error)}; set the variables that the store's own tools use") from error
    return ObjectBucket(url, objects, poll_seconds=2.0)


_memories: dict[str, Any] = {}


def _stat(meta: Any) -> Stat:
    tag = meta["e_tag"] or meta["version"] or meta["last_modified"].isoformat()
    return Stat(meta["path"], meta["size"], tag, meta["last_modified"].timestamp())


def _first_line(error: Exception) -> str:
    """obstore's message without its "Debug source", which spells out the whole request."""
    return str(error).split("\n", 1)[0]
