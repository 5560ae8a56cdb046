"""Draws what ``publishing.picture`` describes; runs in matplotlib's environment.

python chart.py FILE < picture.json
"""

from __future__ import annotations

import json
import sys
from math import ceil, floor, log10

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INCHES_A_BAR = 0.27
INCHES_A_CASE = 0.75
WIDTH_INCHES = 13
DPI = 110

ROOM = 2.0
"""How far beyond the longest bar the axis goes at least."""

OURS, OTHERS, EDGE = "#c8553d", "#7d98a1", "#333333"

MEASURES = {"cpu": ("CPU µs a request", "{:,.0f}"), "rate": ("requests/s", "{:,.0f}")}


def panel(axes: Axes, case: dict, measure: str) -> None:
    """Bars of one case by one measure, the first on top."""
    bars = case["bars"]
    middles, lows, highs = zip(*(bar[measure] for bar in bars), strict=True)
    places = range(len(bars))
    errors = [
        [middle - low for middle, low in zip(middles, lows, strict=True)],
        [high - middle for middle, high in zip(middles, highs, strict=True)],
    ]
    colours = [OURS if bar["ours"] else OTHERS for bar in bars]
    axes.barh(places, middles, color=colours, height=0.72)
    axes.errorbar(middles, places, xerr=errors, fmt="none", ecolor=EDGE, elinewidth=1)
    axes.set_xscale("log")
    # Whole decades, with room for the number beside the longest bar.
    axes.set_xlim(10 ** floor(log10(min(lows))), 10 ** ceil(log10(max(highs) * ROOM)))
    axes.set_yticks(places, [bar["title"] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    name, form = MEASURES[measure]
    axes.set_title(f"{case['title']}: {name}", fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    for place, middle, high in zip(places, middles, highs, strict=True):
        axes.annotate(
            form.format(middle),
            (high, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )


def main(path: str) -> int:
    """Read the picture's description, write the file."""
    cases = json.load(sys.stdin)["cases"]
    heights = [INCHES_A_CASE + INCHES_A_BAR * len(case["bars"]) for case in cases]
    figure, grid = plt.subplots(
        len(cases),
        len(MEASURES),
        figsize=(WIDTH_INCHES, sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for line, case in zip(grid, cases, strict=True):
        for axes, measure in zip(line, MEASURES, strict=True):
            panel(axes, case, measure)
        line[1].set_yticklabels([])
    figure.savefig(path, dpi=DPI)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
