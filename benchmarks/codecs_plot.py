"""Draw what `benchmarks/codecs.py --json FILE` measured: bytes a change, and the speed of publish and of decode.

    python benchmarks/codecs_plot.py FILE IMAGE …

An image's ending says its kind: .svg or .png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = ("#12507f", "#2f86c6", "#74b8ea", "#b5dcf7"), ("#555555", "#828282", "#aeaeae", "#d6d6d6")
"""a colour a trace"""
TOO_LONG = 7
"""bytes a change, beyond which a bar is cut off and says its length"""


def draw(tables: list[dict[str, Any]]) -> Any:
    """The figure: a bar for each codec and trace."""
    names = list(dict.fromkeys(row["codec"] for table in tables for row in table["rows"]))[::-1]
    figure, (sizes, speeds) = plt.subplots(1, 2, figsize=(11, 0.6 * len(names) + 1.6), sharey=True)
    thick = 0.84 / len(tables)
    for number, table in enumerate(tables):
        rows = sorted(table["rows"], key=lambda row: names.index(row["codec"]))  # what was not measured has no bar
        places = [names.index(row["codec"]) + 0.42 - thick * (number + 0.5) for row in rows]
        shades = [(OURS if row["codec"].startswith("deltawire") else OTHERS)[number % len(OURS)] for row in rows]
        lengths = [row["bytes"] for row in rows]
        label = f"{table['trace']}, {table['density']:.2%}"
        sizes.barh(places, [min(length, TOO_LONG) for length in lengths], thick, color=shades, label=label)
        for place, length in zip(places, lengths, strict=True):
            sizes.text(min(length, TOO_LONG) + 0.08, place, f"{length:.2f}", va="center", fontsize=6)
        speeds.scatter([row["publish"] for row in rows], places, marker="o", s=18, color=shades)
        speeds.scatter([row["decode"] for row in rows], places, marker="x", s=18, color=shades)
    sizes.set(xlim=(0, TOO_LONG + 1), xlabel="bytes a changed weight", yticks=range(len(names)))
    sizes.set_yticklabels(names)
    speeds.set(xscale="log", xlabel="speed, as a share of one compare pass: o publish, x decode")
    speeds.grid(axis="x", alpha=0.3)
    sizes.legend(loc="center right", bbox_to_anchor=(1, 0.71), fontsize=7, title="first step of", title_fontsize=7)
    figure.tight_layout()
    return figure


def main() -> None:
    """Read the file, and write each image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    options = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "codecs"  # equal figures, equal bytes
    figure = draw(json.loads(options.file.read_text()))
    for image in options.images:
        figure.savefig(image, dpi=150, metadata={"Date": None} if image.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
