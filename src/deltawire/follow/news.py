"""What a follower says between updates: that it waits, that it fetches a whole model, that its server is current."""

import msgspec


class Waiting(msgspec.Struct, frozen=True, tag="waiting", tag_field="event"):
    """There is nothing to serve yet, for `seconds` by now."""

    reason: str
    seconds: float


class Fetching(msgspec.Struct, frozen=True, tag="fetching", tag_field="event"):
    """An anchor is being fetched: `done` of its `total` bytes are there."""

    run: str
    version: int
    done: int
    total: int


class Current(msgspec.Struct, frozen=True, tag="current", tag_field="event"):
    """The server serves what it should, with nothing left to do: at the start, or again after a problem."""

    run: str
    version: int


class Note(msgspec.Struct, frozen=True, tag="note", tag_field="event"):
    """Something about the server that its operator may not expect."""

    note: str


News = Waiting | Fetching | Current | Note
