"""Which chunks of which xorbs hold a range of a file, and the same as the client's JSON (both versions)."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltawire.hub_server.shards import Segment
from deltawire.hub_server.xet_hashes import to_text
from deltawire.hub_server.xorbs import ChunkTable


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Whole chunks that cover a range of a file: drop `skip` bytes of what they decode to, then keep `length`."""

    terms: tuple[Segment, ...]
    skip: int
    length: int


def reconstruct_range(
    segments: Sequence[Segment], start: int, stop: int, table_of: Callable[[bytes], ChunkTable]
) -> Reconstruction:
    """The fewest chunks that hold bytes `start` up to and not including `stop` of a file made of `segments`.

    The range must lie inside the file and not be empty. Only xorbs that the range touches are looked up.
    """
    terms: list[Segment] = []
    skip = 0
    position = 0
    for segment in segments:
        if position < stop and position + segment.length > start:
            offsets = table_of(segment.xorb).raw_offsets
            origin = offsets[segment.first] - position  # raw offset in the xorb minus offset in the file
            first = max(segment.first, bisect_right(offsets, start + origin) - 1)
            last = min(segment.last, bisect_left(offsets, stop + origin))
            if not terms:
                skip = start + origin - offsets[first]
            terms.append(Segment(segment.xorb, offsets[last] - offsets[first], first, last))
        position += segment.length
    return Reconstruction(tuple(terms), skip, stop - start)


def as_json(
    reconstruction: Reconstruction,
    *,
    version: int,
    table_of: Callable[[bytes], ChunkTable],
    url_of: Callable[[str], str],
) -> dict[str, Any]:
    """The reconstruction as the body of `/v1/reconstructions` or `/v2/…`; `url_of` names where a xorb's bytes are."""
    terms = [
        {
            "hash": to_text(term.xorb),
            "unpacked_length": term.length,
            "range": {"start": term.first, "end": term.last},
        }
        for term in reconstruction.terms
    ]
    fetches = {
        to_text(xorb): _fetches(xorb, reconstruction.terms, table_of(xorb))
        for xorb in {t.xorb for t in reconstruction.terms}
    }
    body: dict[str, Any] = {"offset_into_first_range": reconstruction.skip, "terms": terms}
    if version == 1:
        body["fetch_info"] = {
            name: [{"range": chunks, "url": url_of(name), "url_range": span} for chunks, span in ranges]
            for name, ranges in fetches.items()
        }
    else:
        body["xorbs"] = {
            name: [{"url": url_of(name), "ranges": [{"chunks": chunks, "bytes": span} for chunks, span in ranges]}]
            for name, ranges in fetches.items()
        }
    return body


def _fetches(xorb: bytes, terms: Sequence[Segment], table: ChunkTable) -> list[tuple[dict[str, int], dict[str, int]]]:
    """For one xorb: disjoint chunk ranges that cover its terms, each with its byte range (last byte included)."""
    merged: list[list[int]] = []
    for first, last in sorted((term.first, term.last) for term in terms if term.xorb == xorb):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return [
        ({"start": first, "end": last}, {"start": table.start(first), "end": table.start(last) - 1})
        for first, last in merged
    ]
