"""The page of a bucket server: every run in its buckets, read where they lie."""

from collections.abc import Iterator
from pathlib import Path

from deltawire.buckets.base import Stat, check_key, watch_by_polling
from deltawire.buckets.wrappers import Prefix
from deltawire.errors import NotOffered, TooLarge
from deltawire.fleet.page import Boards
from deltawire.fleet.status import Watcher
from deltawire.hub_server import Store
from deltawire.hub_server.catalog import Entry, Folder
from deltawire.runlog.keys import HEAD_KEY

MOST = 200
"""runs that are listed"""
PAGE = 1000


def hub_page(store: Store) -> Boards:
    """The page of a server's runs. Anyone who reaches it sees all of them: it is for a server without users."""

    def open_watcher(name: str) -> Watcher:
        namespace, bucket, *prefix = name.split("/", 2)
        view = StoreView(store, f"{namespace}/{bucket}")
        return Watcher(Prefix(view, prefix[0]) if prefix else view)

    return Boards(lambda: runs_in(store), open_watcher)


def runs_in(store: Store) -> list[str]:
    """Where runs are: buckets, and folders on their first level, with a HEAD.json; by name."""
    found = []
    for bucket in store.catalog.names():
        level = store.catalog.list(bucket, "", recursive=False, start="", limit=PAGE).items
        folders = [item.path for item in level if isinstance(item, Folder)]
        heads = store.catalog.entries(bucket, [HEAD_KEY, *(f"{folder}/{HEAD_KEY}" for folder in folders)])
        found += [f"{bucket}/{head.path}".removesuffix(f"/{HEAD_KEY}") for head in heads]
    return sorted(found)[:MOST]


class StoreView:
    """One bucket of a server's store, for reading only."""

    conditional_writes = False
    poll_seconds = 0.5

    def __init__(self, store: Store, bucket: str) -> None:
        self._store, self._bucket = store, bucket
        self.url = f"hf://buckets/{bucket}"

    def stat(self, key: str) -> Stat:
        check_key(key)
        return _stat(self._store.catalog.entry(self._bucket, key))

    def get(self, key: str, *, limit: int) -> bytes:
        entry = self._store.catalog.entry(self._bucket, key)
        if entry.size > limit:
            raise TooLarge(f"{self.url}/{key} is {entry.size:,} bytes, more than the {limit:,} allowed here")
        return b"".join(self._store.read(entry))

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        path.write_bytes(self.get(key, limit=limit))

    def put(self, key: str, data: bytes | Path) -> None:
        raise NotOffered(f"{self.url}/{key}: this view is for reading")

    put_new = put

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        start: str | None = after
        while start is not None:
            begin = max(start, prefix)
            page = self._store.catalog.list(self._bucket, prefix, recursive=True, start=begin, limit=PAGE)
            yield from (_stat(item) for item in page.items if isinstance(item, Entry) and item.path > after)
            start = page.next_start

    def delete(self, *keys: str) -> None:
        raise NotOffered(f"{self.url}: this view is for reading")

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)


def _stat(entry: Entry) -> Stat:
    return Stat(entry.path, entry.size, entry.xet_hash.hex(), entry.uploaded_ms / 1000)
