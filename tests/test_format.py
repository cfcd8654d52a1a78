"""docs/FORMAT.md says what the code does: its dtypes, fields, bounds and its example in bytes."""

import re
from pathlib import Path

import pytest
import zstandard

from deltawire.format import body, container, delta_file, streams
from deltawire.format.codecs import directory, gap, tiles
from deltawire.format.codecs.classes import SCHEMES, Scheme
from deltawire.format.codecs.lists import MAX_K
from deltawire.weights.bits import WIDTHS
from deltawire.weights.delta import Delta

PARTS = ("entry", "payload", "bits")
REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "docs" / "FORMAT.md").read_text()


def section(number: str) -> str:
    """The text from a heading to the next one."""
    return TEXT.partition(f"# §{number} ")[2].partition("\n#")[0]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]


def test_the_specification_lists_every_dtype_with_its_width():
    listed = {name: int(width) for names, width in rows(section("1"))[1:] for name in re.findall(r"`(\w+)`", names)}
    assert listed == WIDTHS


def test_the_specification_lists_the_metadata_in_the_order_it_is_written():
    fields = [row[0].strip("`") for row in rows(section("3")) if len(row) == 2][1:]
    first, second = (
        container.read_header(delta_file.encode(Delta(), codec=codec)).metadata for codec in ("gap", "subset")
    )
    assert fields == list(delta_file.FIELDS) == list(first)
    assert list(second) == fields[:-1]
    assert f"| `format` | `{delta_file.FORMAT}` |" in section("3")
    assert (first["version"], second["version"]) == ("1", "2")
    assert "| `version` | `2` where the codec is `subset` or `class`, `1` where it is `gap` or `raw` |" in section("3")


def test_the_specification_lists_every_encoding_with_its_streams():
    listed: dict[str, dict[str, tuple[str, ...]]] = {}
    for codec, encoding, names, _ in (row for row in rows(section("3"))[1:] if len(row) == 4 and "NAME" in row[2]):
        listed.setdefault(codec.strip("`"), {})[encoding.strip("`")] = tuple(re.findall(r"NAME\.(\w+)", names))
    assert listed == streams.SUFFIXES


def test_the_specification_lists_the_encodings_of_every_codec():
    listed = {codec: tuple(encodings) for codec, encodings in streams.SUFFIXES.items()}
    for codec, encodings, _ in (row for row in rows(section("3"))[1:] if len(row) == 3):
        listed[codec.strip("`")] = tuple(re.findall(r"`(\w+)`", encodings))
    listed.pop("codec of the file")
    assert listed == delta_file.ENCODINGS
    codes = re.search(r"u8 +encoding: ([^\n]+)", section("5.5"))[1].split(", ")
    assert codes == [f"{code} {name}" for code, name in enumerate(directory.ENCODINGS)]


def test_the_specification_lists_the_scheme_of_every_dtype_with_classes():
    listed = {row[0].strip("`"): Scheme(*map(int, row[1:])) for row in rows(section("5.7"))[1:]}
    assert listed == SCHEMES


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("2", f"{delta_file.MAX_DELTA_HEADER:,} bytes for a delta file"),
        ("2", f"{container.MAX_HEADER:,} for a checkpoint"),
        ("2", f"more than {container.MAX_RANK} dimensions"),
        ("3", f"more than 2^{directory.MAX_COUNT.bit_length() - 1} - 1 elements"),
        ("3", f"more than {container.MAX_RANK} dimensions"),
        ("5.5", f"at most {directory.MAX_DIRECTORY:,} bytes"),
        ("5.5", f"more than {directory.MAX_TILES:,} tiles in a file"),
        ("5.5", f"a k beyond {MAX_K}"),
        ("5.6", f"less than {body.DENSE_TRY_FROM:.0%}".replace("%", " %")),
        ("5.6", f"more than {body.DENSE_TRY_TINY} elements"),
        ("5.6", f"a multiple of {tiles.STEP} columns wide"),
        ("5.2", f"{gap.LONGEST_GAP} bytes a change"),
        ("5.2", "2, 3, 5 or 10 bytes a change, for elements of 1, 2, 4 or 8 bytes"),
        ("5.2", f"A gap below {gap.ESCAPE} is one byte"),
        ("5.3", f"less than {streams.DENSE_TRY_FROM:.0%}".replace("%", " %")),
        ("5.3", f"more than {streams.DENSE_TRY_TINY} elements"),
    ],
)
def test_the_specification_states_the_bounds_the_code_keeps(number, says):
    assert says in " ".join(section(number).split())


def test_the_longest_steps_in_the_specification_are_those_of_the_code():
    assert dict(zip((1, 2, 4, 8), (2, 3, 5, 10), strict=True)) == gap.LONGEST_STEP


def test_the_example_is_cut_from_the_golden_file():
    data = (REPOSITORY / "tests" / "golden" / "gap.safetensors").read_bytes()
    box = container.read_header(data)
    lines = re.findall(r"^(i32\.\w+) +(file|content) +([0-9a-f ]+)$", section("5.2"), re.MULTILINE)
    assert len(lines) == 4
    for name, part, digits in lines:
        stream = container.tensor(data, box, name).data.tobytes()
        assert bytes.fromhex(digits) == (stream if part == "file" else zstandard.decompress(stream))
    assert dict(zip(*(part.tolist() for part in delta_file.decode(data)["i32"].sparse()), strict=True)) == {
        17: 2**31,
        299: 63,
    }


def test_the_example_of_lists_is_cut_from_the_golden_file():
    golden = REPOSITORY / "tests" / "golden"
    data = (golden / "class.safetensors").read_bytes()
    (file,) = (tensor for tensor in body.read(data, container.read_header(data), "class") if tensor.spec.name == "bf16")
    payload = container.tensor(data, container.read_header(data), "payload").data[:2].tobytes()
    entry, digits, bits = (re.search(rf"^{name} +(.+)$", section("5.6"), re.MULTILINE)[1] for name in PARTS)
    assert bytes.fromhex(digits) == payload
    assert bits.replace("|", "").replace(" ", "") == "".join(f"{byte:08b}"[::-1] for byte in payload)
    content = zstandard.decompress(container.tensor(data, container.read_header(data), "directory").data.tobytes())
    assert bytes.fromhex(entry) in content
    assert file.entries[0].changed == 4
    base = (golden / "class.base.safetensors").read_bytes()
    old = container.tensor(base, container.read_header(base), "bf16").data
    assert " ".join(f"{bits:04x}" for bits in old.tolist()) in " ".join(section("5.7").split())


def test_the_code_cites_no_section_the_specification_lacks():
    headings = set(re.findall(r"^#+ §([\d.]+) ", TEXT, re.MULTILINE)) | {"6"}
    cited = {
        number.rstrip(".")
        for path in (REPOSITORY / "src").rglob("*.py")
        for number in re.findall(r"FORMAT\.md §([\d.]+)", path.read_text())
    }
    assert cited
    assert cited <= headings
