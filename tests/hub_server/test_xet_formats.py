"""The formats of Xet, against what hf_xet 1.8.0 produced and against plain arithmetic."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xet_builders import nodes, shard, xorb

from deltawire.errors import FormatError, NotFound, Truncated, UnknownVersion
from deltawire.hub_server.grants import LIFETIME_SECONDS, MAX_OPEN, Grants
from deltawire.hub_server.reconstruct import as_json, reconstruct_range
from deltawire.hub_server.shards import Segment, build_dedup_shard, parse_shard
from deltawire.hub_server.xet_hashes import chunk_hash, file_hash, from_text, to_text, xorb_hash
from deltawire.hub_server.xorbs import ChunkTable, read_chunks, verify_xorb


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"x", "ee8f129a399d20f10cae506c65e70831a63945b2cf619d39bb4eae90736fd8d7"),
        (b"", "0" * 64),
    ],
)
def test_the_hash_of_a_one_chunk_file_is_what_hf_xet_says(content: bytes, expected: str) -> None:
    assert to_text(file_hash(nodes([content] if content else []))) == expected


def test_the_hash_of_many_chunks_is_what_hf_xet_says() -> None:
    """3,000,000 bytes of "abcabc…" have no natural cut: 22 chunks of 128 KiB and a rest."""
    content = b"abc" * 1_000_000
    chunks = [content[at : at + 131_072] for at in range(0, len(content), 131_072)]
    expected = "b164658d1a8228a4935594390c2d1837c399638e0c4b3ca2c298303c4e85e210"
    assert to_text(file_hash(nodes(chunks))) == expected


@given(st.binary(min_size=32, max_size=32))
def test_a_hash_survives_being_written_as_text(digest: bytes) -> None:
    assert from_text(to_text(digest)) == digest


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" * 21 + "a", "0" * 63 + "\n"])
def test_text_that_is_no_hash_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="not a Xet hash"):
        from_text(text)


def test_the_order_and_the_lengths_of_chunks_are_part_of_a_hash() -> None:
    one, two = nodes([b"one", b"two"])
    hashes = {xorb_hash(children) for children in ([one, two], [two, one], [one], [(one[0], 4), two])}
    assert len(hashes) == 4


chunk_lists = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=30)


@given(chunks=chunk_lists, scheme=st.sampled_from([0, 1, 2]), data=st.data())
def test_any_run_of_chunks_of_a_xorb_reads_back(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], scheme: int, data: st.DataObject
) -> None:
    digest, stored = xorb(chunks, scheme=scheme)
    path = tmp_path_factory.getbasetemp() / "xorb"
    path.write_bytes(stored)
    with path.open("rb") as file:
        table = verify_xorb(file, digest)
        assert ChunkTable.unpack(table.pack()) == table
        first = data.draw(st.integers(0, len(chunks) - 1))
        last = data.draw(st.integers(first + 1, len(chunks)))
        assert list(read_chunks(file, table, first, last)) == chunks[first:last]


def table_of_chunks(chunks: list[bytes]) -> ChunkTable:
    ends = [sum(len(chunk) + 8 for chunk in chunks[: count + 1]) for count in range(len(chunks))]
    return ChunkTable(tuple(map(chunk_hash, chunks)), tuple(map(len, chunks)), tuple(ends))


@given(xorbs=st.lists(chunk_lists, min_size=1, max_size=3), data=st.data())
def test_a_plan_covers_the_range_and_no_chunk_more(xorbs: list[list[bytes]], data: st.DataObject) -> None:
    tables = {bytes([number]) * 32: table_of_chunks(chunks) for number, chunks in enumerate(xorbs)}
    contents = {bytes([number]) * 32: chunks for number, chunks in enumerate(xorbs)}
    segments = []
    for _ in range(data.draw(st.integers(1, 5))):
        name = data.draw(st.sampled_from(sorted(tables)))
        first = data.draw(st.integers(0, len(contents[name]) - 1))
        last = data.draw(st.integers(first + 1, len(contents[name])))
        segments.append(Segment(name, sum(map(len, contents[name][first:last])), first, last))
    file = b"".join(b"".join(contents[s.xorb][s.first : s.last]) for s in segments)
    start = data.draw(st.integers(0, len(file) - 1))
    stop = data.draw(st.integers(start + 1, len(file)))

    plan = reconstruct_range(segments, start, stop, tables.__getitem__)
    pieces = [b"".join(contents[term.xorb][term.first : term.last]) for term in plan.terms]
    assert [len(piece) for piece in pieces] == [term.length for term in plan.terms]
    assert b"".join(pieces)[plan.skip : plan.skip + plan.length] == file[start:stop]
    assert plan.skip < len(contents[plan.terms[0].xorb][plan.terms[0].first])
    last_term = plan.terms[-1]
    unused = len(b"".join(pieces)) - plan.skip - plan.length
    assert unused < len(contents[last_term.xorb][last_term.last - 1])

    body = as_json(plan, version=1, table_of=tables.__getitem__, url_of=lambda name: f"/{name}")
    for name, fetches in body["fetch_info"].items():
        spans = [(fetch["range"]["start"], fetch["range"]["end"]) for fetch in fetches]
        assert all(before[1] < after[0] for before, after in pairwise(spans))
        wanted = [term for term in plan.terms if to_text(term.xorb) == name]
        assert all(any(span[0] <= term.first and term.last <= span[1] for span in spans) for term in wanted)
        assert {at for span in spans for at in range(*span)} == {
            at for term in wanted for at in range(term.first, term.last)
        }


def test_a_shard_reads_as_it_was_built_and_the_dedup_answer_is_a_shard_too() -> None:
    chunks = [b"one", b"three"]
    digest, stored = xorb(chunks)
    parsed = parse_shard(shard(chunks))
    assert parsed.files[0].segments == (Segment(digest, 8, 0, 2),)
    assert parsed.xorbs[0].chunks == tuple(nodes(chunks))
    answer = build_dedup_shard([(digest, len(stored), table_of_chunks(chunks))], now=1_000_000)
    again = parse_shard(answer)
    assert (again.files, again.xorbs) == ((), parsed.xorbs)


def test_a_shard_of_another_kind_is_refused_by_what_is_wrong_with_it() -> None:
    good = shard([b"chunk"])
    with pytest.raises(Truncated):
        parse_shard(good[:-1])
    with pytest.raises(UnknownVersion, match="version 3"):
        parse_shard(good[:32] + b"\3" + good[33:])
    with pytest.raises(FormatError, match="tag"):
        parse_shard(b"?" + good[1:])


def test_a_grant_and_what_was_sent_for_it_are_forgotten_after_an_hour(tmp_path: Path) -> None:
    now = 0.0
    grants = Grants(clock=lambda: now)
    staged = tmp_path / "staged"
    staged.write_bytes(b"half")
    grant = grants.issue(b"x" * 32)
    grants.stage(grant, staged)
    now = LIFETIME_SECONDS
    grants.issue(b"y" * 32)
    assert not staged.exists()
    with pytest.raises(NotFound):
        grants.take(grant, b"x" * 32)


def test_of_too_many_grants_the_oldest_goes_with_its_upload(tmp_path: Path) -> None:
    grants = Grants()
    staged = tmp_path / "staged"
    staged.write_bytes(b"half")
    oldest, second = grants.issue(b"x" * 32), grants.issue(b"x" * 32)
    grants.stage(oldest, staged)
    for _ in range(MAX_OPEN - 1):
        grants.issue(b"y" * 32)
    assert not staged.exists()
    with pytest.raises(NotFound):
        grants.check(oldest)
    grants.check(second)


def test_a_second_upload_for_a_grant_replaces_the_first(tmp_path: Path) -> None:
    grants = Grants()
    first, second = tmp_path / "first", tmp_path / "second"
    grant = grants.issue(b"x" * 32)
    for path in (first, second):
        path.write_bytes(b"data")
        grants.stage(grant, path)
    assert not first.exists()
    assert grants.take(grant, b"x" * 32) == second
