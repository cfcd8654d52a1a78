"""docs/FORMAT.md says what the code does: its dtypes, fields, bounds and its example in bytes."""

import re
from pathlib import Path

import pytest
import zstandard

from deltawire.format import container, delta_file
from deltawire.format.codecs import gap
from deltawire.weights.bits import WIDTHS
from deltawire.weights.delta import Delta

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
    data = delta_file.encode(Delta())
    assert fields == list(delta_file.FIELDS) == list(container.read_header(data).metadata)
    assert f"| `format` | `{delta_file.FORMAT}` |" in section("3")
    assert f"| `version` | `{delta_file.VERSION}` |" in section("3")


def test_the_specification_lists_every_encoding_with_its_streams():
    listed: dict[str, dict[str, tuple[str, ...]]] = {}
    for codec, encoding, streams, _ in (row for row in rows(section("3"))[1:] if len(row) == 4 and "NAME" in row[2]):
        listed.setdefault(codec.strip("`"), {})[encoding.strip("`")] = tuple(re.findall(r"NAME\.(\w+)", streams))
    assert listed == delta_file.ENCODINGS


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("2", f"{delta_file.MAX_DELTA_HEADER:,} bytes for a delta file"),
        ("2", f"{container.MAX_HEADER:,} for a checkpoint"),
        ("2", f"more than {container.MAX_RANK} dimensions"),
        ("3", f"more than 2^{delta_file.MAX_COUNT.bit_length() - 1} - 1 elements"),
        ("3", f"more than {container.MAX_RANK} dimensions"),
        ("5.2", f"{gap.LONGEST_GAP} bytes a change"),
        ("5.2", "2, 3, 5 or 10 bytes a change, for elements of 1, 2, 4 or 8 bytes"),
        ("5.2", f"A gap below {gap.ESCAPE} is one byte"),
        ("5.3", f"less than {delta_file.DENSE_TRY_FROM:.0%}".replace("%", " %")),
        ("5.3", f"more than {delta_file.DENSE_TRY_TINY} elements"),
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


def test_the_code_cites_no_section_the_specification_lacks():
    headings = set(re.findall(r"^#+ §([\d.]+) ", TEXT, re.MULTILINE)) | {"6"}
    cited = {
        number.rstrip(".")
        for path in (REPOSITORY / "src").rglob("*.py")
        for number in re.findall(r"FORMAT\.md §([\d.]+)", path.read_text())
    }
    assert cited
    assert cited <= headings
