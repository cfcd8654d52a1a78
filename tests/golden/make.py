"""Make a new golden delta file from values written out here. Run by hand, for a new format version or codec only:

    python tests/golden/make.py gap

It refuses to overwrite: a committed golden file never changes, or it would stop proving that old files stay readable.
Beside NAME.safetensors it writes NAME.json, what the file decodes to, taken from the values below and not from the
library, and for a codec that needs them NAME.base.safetensors, the weights before the delta.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np

from deltawire.format import delta_file
from deltawire.format.container import write
from deltawire.weights.bits import WIDTHS, Bits, unsigned
from deltawire.weights.delta import Delta, TensorDelta

HERE = Path(__file__).parent
Tensor = tuple[str, list[int], dict[int, int]]
"""dtype, shape, {flat position: step}; a step below zero is taken modulo 2^bits"""


def mixed(i: int) -> int:
    """A number that looks random, the same everywhere."""
    return int(hashlib.sha256(str(i).encode()).hexdigest()[:8], 16)


GAP: dict[str, Tensor] = {
    "bf16": ("BF16", [70, 1000], {0: 1, 1: -1, 256: 1, 512: 2, 769: -0x8000, 69999: 64}),
    "bool": ("BOOL", [100], {99: 1}),
    "f64": ("F64", [9, 9], {40: -(2**63), 41: 2**63 - 1, 80: -1}),
    "f8": ("F8_E4M3", [80], {0: 127, 79: -128}),
    "i32": ("I32", [300], {17: -(2**31), 299: 63}),
}
"""Gaps of 0, 254, 255, 256 and 69,229 before a change; the longest varint of every width; first and last element."""
DENSE: dict[str, Tensor] = {
    "bf16": ("BF16", [5, 5], {i: 1 if i % 3 else -1 for i in range(25)}),
    "f32.scalar": ("F32", [], {0: -(2**31)}),
    "f8": ("F8_E5M2", [3, 100], {i: (i * 7) % 256 - 128 for i in range(300) if (i * 7) % 256 != 128}),
    "u64": ("U64", [2, 3], {i: (0x0123_4567_89AB_CDEF >> i) - 2**63 * (i == 4) for i in (0, 1, 2, 4, 5)}),
}
"""Every element or nearly, zeros among them, a scalar, and planes of one, two, four and eight bytes."""
RAW: dict[str, Tensor] = {
    "bf16": ("BF16", [40, 10], {0: 1, 7: -1, 399: 0x7F81}),
    "f16": ("F16", [], {0: -1}),
    "i64": ("I64", [12], {3: 2**63, 11: -1}),
    "u8": ("U8", [300], {255: 255, 256: 1}),
}
SUBSET: dict[str, Tensor] = {
    "bf16": ("BF16", [70, 1000], {0: 1, 1: -1, 256: 1, 512: 2, 769: -0x8000, 33333: 3, 34567: -200, 69999: 64}),
    "bool": ("BOOL", [100], {99: 1}),
    "f32": ("F32", [3, 40, 20], {**{i: 1 - 2 * (i % 2) for i in range(20, 60, 3)}, 2399: 2**31 - 1}),
    "f64": ("F64", [9, 9], {40: -(2**63), 41: 2**63 - 1, 80: -1}),
    "f8": ("F8_E4M3", [600], {i: 1 - mixed(i) // 16 % 2 * 2 for i in range(600) if mixed(i) % 16 > 5}),
    "i32": ("I32", [300], {17: -(2**31), 299: 63}),
}
"""Every width and its longest step, dead rows, a list of the unchanged, ladders with and without."""
SUBSET_DENSE: dict[str, Tensor] = {
    "bf16": ("BF16", [5, 50], dict.fromkeys(range(250), 1)),
    "f8": ("F8_E5M2", [300], {i: 1 - 2 * (i // 100 % 2) for i in range(300) if i % 50}),
}
BY_CLASS: dict[str, Tensor] = {
    "bf16": ("BF16", [16], {1: 1, 4: -1, 6: 1, 8: 3}),
    "f16": ("F16", [60, 50], {i: 1 + i % 5 for i in range(100, 900, 17)}),
    "f32": ("F32", [500], {i: (mixed(i) % 3 or -9) for i in range(500) if mixed(i) % 8 == 0}),
    "f64": ("F64", [200], {7: -(2**63), 9: 2**63 - 1, 100: -1}),
    "f8": ("F8_E4M3", [50, 20], dict.fromkeys(range(0, 1000, 11), -3)),
    "f8.5": ("F8_E5M2", [90], dict.fromkeys(range(0, 90, 10), 1)),
}
"""The example of §5.7; every dtype that has classes."""
CLASS_SUBSET: dict[str, Tensor] = {"i16": ("I16", [900], {i: i - 400 for i in range(3, 800, 100)})}
CLASS_DENSE: dict[str, Tensor] = {"bf16": ("BF16", [5, 50], dict.fromkeys(range(250), 1))}
EXAMPLE = "3800 3a80 3c00 3c80 3a80 3c00 bc00 3c01 3a81 3c00 3c02 3c03 3c00 3c00 3a82 3c00"
"""the old bits of tensor bf16 in §5.7"""
CITES = {
    "subset": ["§2", "§3", "§5", "§5.5", "§5.6"],
    "subset.dense": ["§2", "§3", "§5", "§5.3", "§5.5"],
    "class": ["§2", "§3", "§5", "§5.5", "§5.6", "§5.7"],
    "class.subset": ["§2", "§3", "§5", "§5.5", "§5.6"],
    "class.dense": ["§2", "§3", "§5", "§5.3", "§5.5"],
    "gap": ["§2", "§3", "§5", "§5.2"],
    "dense": ["§2", "§3", "§5", "§5.3"],
    "raw": ["§2", "§3", "§5.1"],
}
TABLES = {
    "gap": GAP,
    "dense": DENSE,
    "raw": RAW,
    "subset": SUBSET,
    "subset.dense": SUBSET_DENSE,
    "class": BY_CLASS,
    "class.subset": CLASS_SUBSET,
    "class.dense": CLASS_DENSE,
}


def delta_of(table: dict[str, Tensor]) -> Delta:
    """The delta that a table spells out."""
    tensors = {}
    for name, (dtype, shape, changes) in table.items():
        kind = unsigned(dtype)
        steps = np.array([step % (1 << 8 * kind.itemsize) for step in changes.values()], kind)
        tensors[name] = TensorDelta(dtype, tuple(shape), np.array(list(changes), np.int64), steps)
    return Delta(tensors)


def base_of(table: dict[str, Tensor]) -> dict[str, Bits]:
    """Weights before the delta: element i holds i * 40503 modulo 2^bits."""
    base = {}
    for name, (dtype, shape, _) in table.items():
        kind = unsigned(dtype)
        values = [i * 40503 % (1 << 8 * kind.itemsize) for i in range(math.prod(shape))]
        if (name, shape) == ("bf16", [16]):
            values = [int(digits, 16) for digits in EXAMPLE.split()]
        base[name] = Bits(dtype, tuple(shape), np.array(values, kind))
    return base


def main(name: str) -> None:
    """Write NAME's files; an existing one is an error."""
    table, base = TABLES[name], base_of(TABLES[name])
    codec, _, encoding = ("gap", "", name) if name == "dense" else name.partition(".")
    data = delta_file.encode(delta_of(table), codec=codec, base=base, run="golden", parent=6, version=7)
    expected = {
        "cites": [f"docs/FORMAT.md {section}" for section in CITES[name]],
        "codec": codec,
        "encoding": encoding or codec,
        "range": ["golden", 6, 7],
        "tensors": {
            name: {
                "dtype": dtype,
                "shape": shape,
                "steps": {str(i): step % (1 << 8 * WIDTHS[dtype]) for i, step in changes.items()},
            }
            for name, (dtype, shape, changes) in table.items()
        },
    }
    text = json.dumps(expected, indent=1, ensure_ascii=False) + "\n"
    files = {f"{name}.safetensors": data, f"{name}.json": text.encode()}
    if codec in ("raw", "class"):
        files[f"{name}.base.safetensors"] = bytes(write(base, {}))
    for file, content in files.items():
        with (HERE / file).open("xb") as out:
            out.write(content)


if __name__ == "__main__":
    main(sys.argv[1])
