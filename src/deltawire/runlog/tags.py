"""Tags: names that people give to versions. A tag is one small record of a run; docs/FORMAT.md §8 specifies it."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import AlreadyExists, ChainError, FormatError, NotFound, TooLarge
from deltawire.runlog.keys import tag_key, tag_name, tags_prefix
from deltawire.runlog.records import Position
from deltawire.runlog.signing import UNSIGNED, SigningKey, Trust

MAX_TAG = 64 << 10
"""bytes of the largest tag accepted"""
MAX_TAGS = 10_000
"""tags of one run that are read"""
_ROOT = re.compile(r"[0-9a-f]{64}")


class Tag(msgspec.Struct, frozen=True):
    """A name for a version. `root` is that of the version's weights, so that a tag never names others.

    `created` is seconds since the epoch by the clock of who wrote it.
    """

    run: str
    name: str
    version: int
    root: str
    created: float
    signer: str | None = None
    signature: str | None = None
    format: int = 1


@dataclass(frozen=True, slots=True)
class TagReport:
    """A tag that was written, and the version it named before, if it was moved."""

    tag: Tag
    before: int | None


def write_tag(
    bucket: Bucket,
    position: Position,
    name: str,
    *,
    move: bool = False,
    key: SigningKey | None = None,
    clock: Callable[[], float] = time.time,
) -> TagReport:
    """Name a version. With `move` a tag that is there names this version from now on.

    Raises AlreadyExists for a tag that is there and names another version, FormatError for a bad name, BucketError.
    """
    where = tag_key(position.run, name)
    before = None
    with suppress(NotFound, FormatError, ChainError):
        before = read_tag(bucket, position.run, name).version
    tag = _signed(Tag(position.run, name, position.version, position.root, clock()), key)
    if move:
        bucket.put(where, _encode(tag))
        return TagReport(tag, before)
    try:
        bucket.put_new(where, _encode(tag))
    except AlreadyExists:
        if before != position.version:
            named = "another version" if before is None else f"version {before}"
            raise AlreadyExists(f"{bucket.url}: tag {name} names {named}; --move moves it") from None
    return TagReport(tag, before)


def read_tag(bucket: Bucket, run: str, name: str, *, trust: Trust | None = None) -> Tag:
    """One tag. Raises NotFound, FormatError, ChainError; BadSignature unless a trusted key signed it."""
    key = tag_key(run, name)
    where, data = f"{bucket.url}/{key}", bucket.get(key, limit=MAX_TAG)
    try:
        tag = msgspec.json.decode(data, type=Tag)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not a tag: {error}") from None
    if tag.format != 1 or tag.version < 0 or not _ROOT.fullmatch(tag.root):
        raise FormatError(f"{where}: format {tag.format}, version {tag.version} or root is not that of a tag")
    if (tag.run, tag.name) != (run, name):
        raise ChainError(f"{where} holds tag {tag.name!r} of run {tag.run}")
    (trust or Trust()).check(data, tag.signer, tag.signature, where=where)
    return tag


def read_tags(bucket: Bucket, run: str, *, trust: Trust | None = None) -> list[Tag]:
    """The tags of a run, by name. Junk, and what is not signed as `trust` asks, is passed over.

    Raises TooLarge where more than MAX_TAGS lie there; BucketError."""
    found = []
    for count, stat in enumerate(bucket.list(tags_prefix(run))):
        if count >= MAX_TAGS:
            raise TooLarge(f"{bucket.url}/{tags_prefix(run)} holds more than {MAX_TAGS:,} tags; remove some")
        with suppress(NotFound, FormatError, ChainError):
            found.append(read_tag(bucket, run, tag_name(run, stat.key), trust=trust))
    return found


def delete_tag(bucket: Bucket, run: str, name: str) -> None:
    """Remove a tag; the version that it named stays. Raises NotFound, FormatError, BucketError."""
    bucket.stat(tag_key(run, name))
    bucket.delete(tag_key(run, name))


def _signed(tag: Tag, key: SigningKey | None) -> Tag:
    if key is None:
        return tag
    blank = msgspec.structs.replace(tag, signer=key.public, signature=UNSIGNED)
    return msgspec.structs.replace(blank, signature=key.sign(_encode(blank)))


def _encode(tag: Tag) -> bytes:
    return msgspec.json.encode(tag, order="sorted")
