"""A store in this process's memory with a clock of its own: what the simulation runs on. No thread, no sleep."""

import builtins
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from deltawire.buckets.atomic import replacing
from deltawire.buckets.base import Listing, Stat, check_key, check_prefix, look_then_put, watch_by_polling
from deltawire.errors import NotFound, TooLarge


class Clock:
    """A time that moves only when it is asked to. Calling it gives seconds since the epoch."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class MemoryStore:
    """A `Bucket` in a dictionary. Objects are stamped by `clock`. With `fenced` False it cannot refuse a second
    writer, as `hf://` cannot."""

    def __init__(self, name: str = "store", *, clock: Callable[[], float], fenced: bool = True) -> None:
        self.url, self.poll_seconds = f"simulated://{name}", 0.01
        self._clock, self._fenced = clock, fenced
        self._objects: dict[str, tuple[bytes, float]] = {}

    def __repr__(self) -> str:
        return f"<bucket {self.url}>"

    @property
    def conditional_writes(self) -> bool:
        return self._fenced

    def stat(self, key: str) -> Stat:
        check_key(key)
        if (found := self._objects.get(key)) is None:
            raise NotFound(f"{self.url}/{key}: no such object")
        data, modified = found
        return Stat(key, len(data), blake3(data).hexdigest()[:16], modified)

    def get(self, key: str, *, limit: int) -> bytes:
        if (size := self.stat(key).size) > limit:
            raise TooLarge(f"{self.url}/{key}: {size} bytes, more than the {limit} that are accepted")
        return self._objects[key][0]

    def get_file(self, key: str, path: Path, *, limit: int) -> None:
        data = self.get(key, limit=limit)
        if not path.parent.is_dir():
            raise NotFound(f"{path.parent}: no such folder on this host")
        with replacing(path) as aside:
            aside.write_bytes(data)

    def put(self, key: str, data: bytes | Path) -> None:
        check_key(key)
        self._objects[key] = (data.read_bytes() if isinstance(data, Path) else bytes(data)), self._clock()

    def put_new(self, key: str, data: bytes | Path) -> None:
        look_then_put(self, key, data.read_bytes() if isinstance(data, Path) else data)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[Stat]:
        check_prefix(prefix)
        keys = sorted(key for key in self._objects if key.startswith(prefix) and key > after)
        return Listing(f"{self.url}/{prefix}").count(self.stat(key) for key in keys)

    def delete(self, *keys: str) -> None:
        for key in keys:
            check_key(key)
        for key in keys:
            self._objects.pop(key, None)

    def watch(self, key: str, *, tag: str | None, timeout: float) -> Stat | None:
        return watch_by_polling(self, key, tag=tag, timeout=timeout)

    def objects(self) -> builtins.list[str]:
        """Every key, in order."""
        return sorted(self._objects)
