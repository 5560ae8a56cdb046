"""Draws the figure of ``policy.py``; runs in matplotlib's environment.

python policy_chart.py FILE < panels.json
"""

from __future__ import annotations

import json
import sys

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

COLUMNS = 4
PANEL_INCHES = (3.6, 2.7)
DPI = 110
STYLES = {
    "slo": ("#c8553d", "o", "slo: ours, slo_ms set"),
    "slo, timeout": ("#e8a598", "D", "slo, timeout: and queue.timeout_ms"),
    "none": ("#333333", "s", "none: ours by default, no holding"),
    "window": ("#7d98a1", "^", "window: 2 ms"),
    "fitted": ("#c9a227", "v", "fitted: BentoML's rule"),
}


def main(path: str) -> int:
    """Read the panels, write the file."""
    panels = json.load(sys.stdin)
    rows = -(-len(panels) // COLUMNS)
    width, height = PANEL_INCHES
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(width * COLUMNS, height * rows + 0.5), squeeze=False
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        loads = [100 * load for load in panel["loads"]]
        for name, points in panel["lines"].items():
            colour, marker, label = STYLES[name]
            middles, lows, highs = zip(*points, strict=True)
            axes.plot(loads, middles, color=colour, marker=marker, markersize=4, label=label)
            axes.fill_between(loads, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(panel["title"], fontsize=9, loc="left")
        axes.set_ylim(-3, 103)
        axes.set_xticks(loads)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("load, % of capacity", fontsize=8)
    for row in grid:
        row[0].set_ylabel("rows in time, %", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.5 / (height * rows + 0.5), 1, 1))
    figure.savefig(path, dpi=DPI)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
