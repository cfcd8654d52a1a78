"""Records as JSON and back: a reader refuses what is unsound, whoever wrote it, and a writer what a reader refuses."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.errors import FormatError, UnknownVersion
from deltawire.runlog import bounds, records
from deltawire.runlog.records import BaseCheckpoint, Commit, Head, Payload, Position, Run, read, write
from deltawire.weights.bits import WIDTHS
from deltawire.weights.table import TensorEntry

RUN = "0123456789abcdef"
GOLDEN = Path(__file__).parents[1] / "golden" / "records"


def hexadecimal(digits):
    return st.text("0123456789abcdef", min_size=digits, max_size=digits)


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(0, 2**53 - 1)
tables = st.lists(
    st.builds(
        TensorEntry,
        names,
        st.sampled_from(sorted(WIDTHS)),
        st.lists(st.integers(0, 1000), max_size=4).map(tuple),
        st.booleans(),
    ),
    unique_by=lambda entry: entry.name,
    min_size=1,
    max_size=5,
).map(tuple)
positions = st.builds(Position, hexadecimal(16), numbers, hexadecimal(64))
bases = st.builds(BaseCheckpoint, names, st.none() | hexadecimal(40))
runs = st.builds(Run, hexadecimal(16), tables, finite, st.none() | bases, st.none() | positions)
payloads = st.lists(
    st.builds(Payload, st.from_regex(r"\A[a-z]{1,5}/[a-zω ]{0,9}[a-z]\Z"), numbers, hexadecimal(64)),
    unique_by=lambda payload: payload.key.split("/")[1],
    max_size=4,
).map(tuple)


@st.composite
def commits(draw):
    version = draw(numbers)
    return Commit(
        run=draw(hexadecimal(16)),
        version=version,
        parent=draw(st.none() | st.integers(0, version - 1)) if version else None,
        root=draw(hexadecimal(64)),
        digests=draw(st.dictionaries(names, hexadecimal(16), max_size=4)),
        payloads=draw(payloads),
        created=draw(finite),
        step=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        metrics=draw(st.dictionaries(names, finite, max_size=3)),
    )


heads = st.builds(Head, hexadecimal(16), numbers, names)


@given(runs | commits() | heads)
def test_a_record_comes_back_and_equal_records_give_equal_bytes(record):
    data = write(record)
    back = read(type(record), data, where="here")
    assert back == record
    assert write(back) == data


def run_record(**changes):
    table = [{"name": "w", "dtype": "BF16", "shape": [2, 3], "trainable": True}]
    return {"run": RUN, "table": table, "created": 1.0, "base": None, "supersedes": None, "format": 1} | changes


def commit_record(**changes):
    return {
        "run": RUN,
        "version": 3,
        "parent": 2,
        "root": "a" * 64,
        "digests": {"w": "b" * 16},
        "payloads": [{"key": "deltas/x.safetensors", "size": 5, "blake3": "c" * 64}],
        "created": 1.0,
        "step": None,
        "metrics": {},
        "format": 1,
    } | changes


def head_record(**changes):
    return {"run": RUN, "version": 3, "commit": "runs/x/commits/000003.json", "format": 1} | changes


def entry(**changes):
    return [{"name": "w", "dtype": "BF16", "shape": [2, 3], "trainable": True} | changes]


def payload(**changes):
    return [{"key": "deltas/x.safetensors", "size": 5, "blake3": "c" * 64} | changes]


HOSTILE = [
    (Run, run_record(run="../../../../etc"), "16 hex digits"),
    (Run, run_record(run=RUN.upper()), "16 hex digits"),
    (Run, run_record(run=RUN + "\n"), "16 hex digits"),
    (Run, run_record(run=7), "Expected `str`"),
    (Run, run_record(created=None), "Expected `float`"),
    (Run, run_record(table=[]), "table is empty"),
    (Run, run_record(table=entry() * 2), "stands twice"),
    (Run, run_record(table=entry(name="a\0b")), "NUL"),
    (Run, run_record(table=entry(aliases=["a\0b"]), format=2), "NUL"),
    (Run, run_record(table=entry(aliases=["head", "head"]), format=2), "stands twice"),
    (Run, run_record(table=entry(aliases=[entry()[0]["name"]]), format=2), "stands twice"),
    (Run, run_record(table=entry(aliases="head"), format=2), "Expected `array`"),
    (Run, run_record(table=entry(aliases=["head"])), "format 1 is not that of its table"),
    (Run, run_record(format=2), "format 2 is not that of its table"),
    (Run, run_record(table=entry(name=None)), "Expected `str`"),
    (Run, run_record(table=entry(dtype="F4")), "impossible dtype"),
    (Run, run_record(table=entry(shape=[-1])), "impossible dtype"),
    (Run, run_record(table=entry(shape=[2.5])), "Expected `int`"),
    (Run, run_record(table=entry(shape=[1 << 24, 1 << 24])), "impossible dtype"),
    (Run, run_record(table=entry(shape=[1 << 60, 0])), "impossible dtype"),
    (Run, run_record(table=entry(shape=[1] * 65)), "impossible dtype"),
    (Run, run_record(table=entry(trainable="yes")), "Expected `bool`"),
    (Run, run_record(base="me/base"), "Expected `object"),
    (Commit, commit_record(run=""), "16 hex digits"),
    (Commit, commit_record(version=-1), "version -1"),
    (Commit, commit_record(version=3.5), "Expected `int`"),
    (Commit, commit_record(version="3"), "Expected `int`"),
    (Commit, commit_record(version=1 << 53), "version 9007199254740992"),
    (Commit, commit_record(version=10**300), "version|out of range"),
    (Commit, commit_record(parent=3), "parent 3"),
    (Commit, commit_record(parent=-1), "parent -1"),
    (Commit, commit_record(root="a" * 63), "root"),
    (Commit, commit_record(root="A" * 64), "root"),
    (Commit, commit_record(digests={"w": "xyz"}), "digest"),
    (Commit, commit_record(digests={"w": 7}), "Expected `str`"),
    (Commit, commit_record(digests=[]), "Expected `object`"),
    (Commit, commit_record(metrics={"reward": "good"}), "Expected `float"),
    (Commit, commit_record(payloads=payload(key="../HEAD.json")), "unsafe key"),
    (Commit, commit_record(payloads=payload(key="/etc/passwd")), "unsafe key"),
    (Commit, commit_record(payloads=payload(key="a//b")), "unsafe key"),
    (Commit, commit_record(payloads=payload(key="a\\b")), "unsafe key"),
    (Commit, commit_record(payloads=payload(key="a/\u0000")), "unsafe key"),
    (Commit, commit_record(payloads=payload(key="a/" + "x" * 256)), "unsafe key"),
    (Commit, commit_record(payloads=payload(key="")), "unsafe key"),
    (Commit, commit_record(payloads=payload(size=-1)), "negative size"),
    (Commit, commit_record(payloads=payload(blake3="c" * 12)), "malformed hash"),
    (Commit, commit_record(payloads=payload(key="a/x") + payload(key="b/x")), "same file name"),
    (Head, head_record(run="x"), "16 hex digits"),
    (Head, head_record(version=-1), "version -1"),
    (Head, head_record(commit=None), "Expected `str`"),
]


@pytest.mark.parametrize(("kind", "record", "says"), HOSTILE)
def test_a_hostile_record_is_refused_by_name(kind, record, says):
    with pytest.raises(FormatError, match=rf"^memory://x/key: (.*({says}))"):
        read(kind, json.dumps(record).encode(), where="memory://x/key")


@pytest.mark.parametrize("make", [run_record, commit_record, head_record])
def test_the_records_these_hostile_ones_were_made_from_are_sound(make):
    kind = {run_record: Run, commit_record: Commit, head_record: Head}[make]
    assert read(kind, json.dumps(make()).encode(), where="here").run == RUN


@pytest.mark.parametrize("kind", [Run, Commit, Head])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{",
        b'{"format": 1}',
        b'{"format": 1, "run": "\xff"}',
        b'{"format": 1, "run": ' + b"[" * 200_000,
        b'{"format": 1, "x": ' + b'{"a":' * 200_000,
        b"\xef\xbb\xbf{}",
        b'{"format": 1}{"format": 1}',
    ],
    ids=lambda data: data[:12].decode(errors="replace"),
)
def test_bytes_that_are_no_record_are_refused(kind, data):
    with pytest.raises(FormatError, match=r"^here: not a"):
        read(kind, data, where="here")


@pytest.mark.parametrize("make", [run_record, commit_record, head_record])
@pytest.mark.parametrize("number", [0, 4, -1, 10**6])
def test_a_record_of_another_format_version_says_upgrade_even_if_it_cannot_be_parsed(make, number):
    kind = {run_record: Run, commit_record: Commit, head_record: Head}[make]
    known = "1 or 2 or 3" if kind is Run else "1"
    with pytest.raises(UnknownVersion, match=f"format {number}; this deltawire reads format {known}, upgrade"):
        read(kind, json.dumps(make(format=number, run={"new": "shape"})).encode(), where="here")


@pytest.mark.parametrize("make", [commit_record, head_record])
def test_format_2_is_one_of_run_records_alone(make):
    kind = {commit_record: Commit, head_record: Head}[make]
    with pytest.raises(UnknownVersion, match="format 2; this deltawire reads format 1, upgrade"):
        read(kind, json.dumps(make(format=2)).encode(), where="here")


def test_a_run_record_with_aliases_is_read_as_the_golden_one_says_and_written_the_same_way():
    data = (GOLDEN / "run-format-2.json").read_bytes().rstrip()
    run = read(Run, data, where="here")
    embedding, norm = run.table
    assert (embedding.name, embedding.aliases) == ("model.embed_tokens.weight", ("lm_head.weight",))
    assert (embedding.dtype, embedding.shape, embedding.trainable) == ("BF16", (50, 32), True)
    assert (norm.name, norm.aliases, norm.trainable) == ("model.norm.weight", (), False)
    assert records.aliases_of(run.table) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (run.format, write(run)) == (2, data)


def test_the_golden_run_of_format_3_stays_readable_and_lists_what_its_deltas_may_be_of():
    data = (GOLDEN / "run-format-3.json").read_bytes().rstrip()
    run = read(Run, data, where="here")
    assert (run.format, run.codecs, run.may_use) == (3, ("subset",), ("subset",))
    assert run.table[0].aliases == ("lm_head.weight",)
    assert write(run) == data


def test_a_run_that_lists_no_codecs_is_of_codec_gap():
    run = read(Run, (GOLDEN / "run-format-2.json").read_bytes(), where="here")
    assert run.may_use == ("gap",)
    with pytest.raises(FormatError, match="here is of codec 'subset', where its run allows gap"):
        bounds.require_codec("subset", run, "here")


def test_a_run_of_codecs_that_this_reader_does_not_know_is_refused_by_name():
    record = json.loads((GOLDEN / "run-format-3.json").read_text()) | {"codecs": ["arith", "subset"]}
    with pytest.raises(UnknownVersion, match="codecs arith; this deltawire reads subset, class, gap, upgrade it"):
        read(Run, json.dumps(record).encode(), where="here")


@pytest.mark.parametrize(
    "changed",
    [
        {"codecs": []},
        {"codecs": ["gap", "gap"]},
        {"format": 2},
        {"format": 1},
        {"codecs": "subset"},
        {"codecs": ["class", "subset"]},
    ],
)
def test_a_list_of_codecs_that_no_writer_writes_is_refused(changed):
    record = json.loads((GOLDEN / "run-format-3.json").read_text()) | changed
    with pytest.raises(FormatError):
        read(Run, json.dumps(record).encode(), where="here")


def test_a_run_without_aliases_is_written_in_the_format_that_every_reader_knows():
    plain = records.in_its_format(Run(RUN, (TensorEntry("w", "BF16", (2, 3)),), 1.0))
    assert json.loads(write(plain))["format"] == 1
    assert b"aliases" not in write(plain)


def test_fields_of_a_later_minor_writer_are_ignored():
    assert read(Head, json.dumps(head_record(signature="…")).encode(), where="here") == Head(
        RUN, 3, "runs/x/commits/000003.json"
    )


@pytest.mark.parametrize(
    "record",
    [
        Head("not hex", 1, "x"),
        Head(RUN, -1, "x"),
        Run(RUN, (TensorEntry("w", "F4", ()),), 0.0),
        Commit(RUN, 1, 1, "a" * 64, {}, (), 0.0),
        Commit(RUN, 1, 0, "a" * 64, {}, (Payload("../x", 0, "a" * 64),), 0.0),
    ],
)
def test_a_record_that_no_reader_would_accept_is_not_written(record):
    with pytest.raises(FormatError, match=r"^this (run|commit|head) record: "):
        write(record)


def test_a_metric_that_is_not_finite_is_written_as_null():
    commit = Commit(RUN, 0, None, "a" * 64, {}, (), 0.0, metrics={"nan": float("nan"), "inf": float("inf")})
    data = write(commit)
    assert json.loads(data)["metrics"] == {"nan": None, "inf": None}
    assert read(Commit, data, where="here").metrics == {"nan": None, "inf": None}


def test_a_position_reads_as_run_and_version():
    assert str(Position(RUN, 7, "a" * 64)) == f"{RUN}:7"
    commit = Commit(RUN, 7, 6, "a" * 64, {}, (Payload("a", 3, "a" * 64), Payload("b", 4, "a" * 64)), 0.0)
    assert commit.position == Position(RUN, 7, "a" * 64)
    assert commit.wire_bytes == 7
