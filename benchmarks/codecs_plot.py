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

OURS, OTHERS = ("#1b6ca8", "#5aa9e6", "#a9d6f5"), ("#6b6b6b", "#9c9c9c", "#cdcdcd")
"""a colour a trace"""
TOO_LONG = 7
"""bytes a change, beyond which a bar is cut off and says its length"""


def draw(tables: list[dict[str, Any]]) -> Any:
    """The figure: a bar for each codec and trace."""
    names = [row["codec"] for row in tables[0]["rows"]][::-1]
    figure, (sizes, speeds) = plt.subplots(1, 2, figsize=(11, 0.45 * len(names) + 1.6), sharey=True)
    thick = 0.8 / len(tables)
    for number, table in enumerate(tables):
        rows = {row["codec"]: row for row in table["rows"]}
        places = [place + 0.4 - thick * (number + 0.5) for place in range(len(names))]
        shades = [(OURS if name.startswith("deltawire") else OTHERS)[number % 3] for name in names]
        lengths = [rows[name]["bytes"] for name in names]
        label = f"{table['trace']}, {table['density']:.2%}"
        sizes.barh(places, [min(length, TOO_LONG) for length in lengths], thick, color=shades, label=label)
        for place, length in zip(places, lengths, strict=True):
            sizes.text(min(length, TOO_LONG) + 0.08, place, f"{length:.2f}", va="center", fontsize=7)
        speeds.scatter([rows[name]["publish"] for name in names], places, marker="o", s=18, color=shades)
        speeds.scatter([rows[name]["decode"] for name in names], places, marker="x", s=18, color=shades)
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
