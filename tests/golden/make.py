"""Make a new golden delta file from values written out here. Run by hand, for a new format version or codec only:

    python tests/golden/make.py gap

It refuses to overwrite: a committed golden file never changes, or it would stop proving that old files stay readable.
Beside NAME.safetensors it writes NAME.json, what the file decodes to, taken from the values below and not from the
library, and for a codec that needs them NAME.base.safetensors, the weights before the delta.
"""

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
CITES = {
    "gap": ["§2", "§3", "§5", "§5.2"],
    "dense": ["§2", "§3", "§5", "§5.3"],
    "raw": ["§2", "§3", "§5.1"],
}
TABLES = {"gap": GAP, "dense": DENSE, "raw": RAW}


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
        base[name] = Bits(dtype, tuple(shape), np.array(values, kind))
    return base


def main(name: str) -> None:
    """Write NAME's files; an existing one is an error."""
    table, base = TABLES[name], base_of(TABLES[name])
    codec = "raw" if name == "raw" else "gap"
    data = delta_file.encode(delta_of(table), codec=codec, base=base, run="golden", parent=6, version=7)
    expected = {
        "cites": [f"docs/FORMAT.md {section}" for section in CITES[name]],
        "codec": codec,
        "encoding": name,
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
    if codec == "raw":
        files[f"{name}.base.safetensors"] = bytes(write(base, {}))
    for file, content in files.items():
        with (HERE / file).open("xb") as out:
            out.write(content)


if __name__ == "__main__":
    main(sys.argv[1])
