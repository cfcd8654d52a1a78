"""Follow an adapter run: vLLM loads each version beside the last, under a name that says which one it is: NAME@VERSION.

Nothing is paused. A request names the version it wants as its model, so every answer says which policy gave it. What
was asked of the version before is answered by it to the end.
"""

import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from deltawire.buckets.atomic import file_system_errors
from deltawire.errors import EngineError, EngineUnsupported, FormatError
from deltawire.follow.loop import FollowLoop, replica_name
from deltawire.follow.options import FollowOptions
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.read.host_cache import cache_folder
from deltawire.read.local_copy import LocalCopy
from deltawire.read.mirror import Mirror, building, held
from deltawire.read.seen import place_of
from deltawire.runlog.figures import figures
from deltawire.runlog.records import Position
from deltawire.vllm.client import EngineClient
from deltawire.weights.bits import count

KEPT = 2
"""versions that requests may name: the one served, and the one before it"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class AdapterReport(msgspec.Struct, frozen=True):
    """One version that the server answers under `name` now.

    `from_version` is what this host's copy held, None when it started from an anchor; `changed` elements differ from
    it, or are all. Every tensor's digest was equal to the commit's in the folder the server loaded. `load_s` is how
    long the server took to answer the load; it reads between two of its passes. `publish_to_served_s` compares this
    host's clock with the publisher's.
    """

    name: str
    run: str
    version: int
    from_version: int | None
    changed: int
    wire_bytes: int
    fetch_s: float
    load_s: float
    publish_to_served_s: float

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs."""
        return figures(self)


class AdapterFollower(FollowLoop[AdapterReport]):
    """Has one vLLM server hold the newest version of an adapter run as `NAME@VERSION`, and the one before it. The
    server, named by its address or reached by a client, runs with --enable-lora and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. `options` are FollowOptions, as a record
    or by keyword; of a pinned version, newer ones are no longer answered.

    `folder` holds, under the adapter's name, a copy that deltas move and a folder for each version the server may read
    again. It reads an adapter when it is loaded, and after it had to make room. By default it is in this user's cache.
    The server must see it under the same path, and each follower of an adapter needs one of its own.

    Raises FormatError for a name that is not letters, digits, '.', '_' and '-'.
    """

    def __init__(
        self,
        bucket_url: str,
        engine: str | EngineClient,
        name: str,
        *,
        folder: Path | str | None = None,
        options: FollowOptions | None = None,
        **keywords: Any,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise FormatError(f"adapter name {name!r}: use at most 100 letters, digits, '.', '_' and '-'")
        options = (options or FollowOptions()).changed(**keywords)
        self._engine = EngineClient(engine) if isinstance(engine, str) else engine
        url = self._engine.url
        state = place_of(options.state, f"{options.replica or replica_name(url)}@{name}")
        super().__init__(bucket_url, options, server=url, state=state)
        self._name = name
        own = (Path(folder) if folder is not None else cache_folder() / self.replica).resolve() / name
        self._versions, self._copy = own / "versions", LocalCopy(own / "copy")

    def close(self) -> None:
        """Stop `run`, wait for the update in progress, and let go of the folder; the server keeps what it serves."""
        super().close()
        self._copy.close()

    def _let_go_of_server(self) -> None:
        self._engine.close()

    def _ask_server(self) -> Position | None:
        return self._newest_of(self._loaded(), self.source.subscriber.run.run)

    def _advance(self, target: Position) -> AdapterReport | None:
        health = self.health
        if not checkpoint.is_adapter(self.source.subscriber.run.table):
            raise EngineUnsupported(f"{self.bucket.url}: run {target.run} is of a model: follow it without --adapter")
        loaded = self._loaded()
        health.labelled = self._newest_of(loaded, target.run)
        health.server_says(health.labelled)
        report = self._load(target, loaded) if loaded.get(self._named(target)) != target else None
        health.labelled = target
        health.is_current(target)
        self._tidy(target)
        return report

    def _named(self, position: Position) -> str:
        return f"{self._name}@{position.version}"

    def _loaded(self) -> dict[str, Position | None]:
        """What the server answers under our names, and which version that is: None where its folder is not ours."""
        ours = re.compile(rf"{re.escape(self._name)}@\d+")
        models = self._engine.models()
        return {name: held(Path(folder)) for name, folder in models.items() if ours.fullmatch(name)}

    @staticmethod
    def _newest_of(loaded: dict[str, Position | None], run: str) -> Position | None:
        ours = [position for position in loaded.values() if position is not None and position.run == run]
        return max(ours, key=lambda position: position.version, default=None)

    def _load(self, target: Position, loaded: Iterable[str]) -> AdapterReport:
        """Have the server read a folder that holds the version, checked against its commit."""
        self._keep_what_is_needed()
        name, started = self._named(target), time.perf_counter()
        mirror, change = self._copy.at(self.source.subscriber, target.version)
        folder = self._lay_out(mirror)
        fetched = time.perf_counter()
        if name in loaded:  # of another run: loaded in place, vLLM would read the folder again for every request
            self._engine.unload_adapter(name)
        self._engine.load_adapter(name, folder)
        load_s = time.perf_counter() - fetched
        if self._engine.models().get(name) != str(folder):
            raise EngineError(f"{self._engine.url} took adapter {name} and does not list it: restart it")
        whole = sum(count(entry.shape) for entry in self.source.subscriber.run.table)
        report = AdapterReport(
            name=name,
            run=target.run,
            version=target.version,
            from_version=None if change.since is None else change.since.version,
            changed=whole if change.anchor is not None else change.delta.changed,
            wire_bytes=change.wire_bytes,
            fetch_s=fetched - started,
            load_s=load_s,
            publish_to_served_s=self.options.clock() - change.commit.created,
        )
        self.options.on_update(report)
        return report

    def _lay_out(self, mirror: Mirror) -> Path:
        """A folder of its own for the version the copy is at; it replaces what a server that was restarted left."""
        folder = self._versions / f"{mirror.position.run}-{mirror.position.version:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        with building(folder, mirror.position) as work:
            checkpoint.copy(mirror.files, work)
            Checkpoint(work).require_digests(mirror.digests, where=f"the copy of {mirror.position} in {folder}")
        return folder

    def _tidy(self, target: Position) -> None:
        """Keep the names of the target and the version before it, and their folders; and one folder more, for what is
        still in flight."""
        loaded = self._loaded()
        ours = [
            (position.version, name)
            for name, position in loaded.items()
            if position is not None and position.run == target.run and position.version <= target.version
        ]
        for name in loaded.keys() - {name for _, name in sorted(ours)[-KEPT:]}:
            self._engine.unload_adapter(name)
        read = set(self._engine.models().values())
        with file_system_errors(str(self._versions)):
            spare = [path for path in self._versions.glob("*") if str(path) not in read]
            for path in sorted(spare, key=lambda path: path.stat().st_mtime)[:-1]:
                shutil.rmtree(path)
