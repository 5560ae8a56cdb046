"""Draws the figure of ``rollout_power.py``; runs in matplotlib's environment.

python rollout_power_chart.py FILE < panels.json
"""

from __future__ import annotations

import json
import sys

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

PANEL_INCHES = (4.2, 3.0)
DPI = 110
STYLES = {
    "sequential": ("#c8553d", "-", "ours: sequential test"),
    "fixed": ("#333333", "--", "fixed thresholds"),
    "quiet": ("#7d98a1", ":", "fixed thresholds, 25 requests a second"),
    "outage": ("#c9a227", "-.", "fixed thresholds, both fail 4 %"),
}


def main(path: str) -> int:
    """Read the panels, write the file."""
    panels = json.load(sys.stdin)
    width, height = PANEL_INCHES
    figure, grid = plt.subplots(
        1, len(panels), figsize=(width * len(panels), height + 0.5), squeeze=False
    )
    for axes, panel in zip(grid.flat, panels, strict=True):
        for name, points in panel["lines"].items():
            colour, dashes, label = STYLES[name]
            last = points[-1][1] if points else 0.0
            requests, percents = zip(*[[0, 0.0], *points, [panel["most"], last]], strict=True)
            axes.step(
                [n / 1000 for n in requests],
                percents,
                where="post",
                color=colour,
                linestyle=dashes,
                label=label,
            )
        axes.set_title(panel["title"], fontsize=10, loc="left")
        axes.set_ylim(-2, 102)
        axes.set_xlim(0, panel["most"] / 1000)
        axes.set_xlabel("requests of the model, thousands", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("rolled back, %", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / (height + 0.5), 1, 1))
    figure.savefig(path, dpi=DPI)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
