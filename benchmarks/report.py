"""Tables for the terminal and for ``benchmarks/results/``, with the machine they were measured on."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

WIDTH = 150
"""Columns of a table that is not printed to a terminal."""


def spread(values: Sequence[float], digits: int = 0) -> str:
    """``median (min–max)``."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, the nearest rank."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass
class Report:
    """A table for the terminal and for ``benchmarks/results/NAME.md``.

    Attributes:
        name: of the benchmark's file.
        title: one line.
        columns, rows: of the table.
        notes: lines below it.
        left: how many of the columns are words, and set left; the others are numbers.
        figure: file name of a picture beside the table's file; empty: there is none.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 1
    figure: str = ""

    def target(self, text: str, met: bool, measured: str, quiet: bool = True) -> None:
        """Note whether a target was met; ``quiet``: no other work disturbed the measurement."""
        verdict = ("met" if met else "missed") + ("" if quiet else " on a busy machine")
        self.notes.append(f"target: {text}: {verdict} ({measured})")

    def publish(self) -> None:
        """Print it and write the file."""
        table = RichTable(title=self.title)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
        console.print(table)
        for note in self.notes:
            console.print(f"- {note}", highlight=False, markup=False)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.name}.md").write_text(self._markdown())

    def _markdown(self) -> str:
        lines = [f"# {self.title}", "", f"Made by `python benchmarks/{self.name}.py`.", ""]
        lines += [f"- {fact}" for fact in machine()]
        if self.figure:
            lines += ["", f"![{self.title}]({self.figure})"]
        lines += ["", "| " + " | ".join(self.columns) + " |"]
        rules = ("---" if i < self.left else "---:" for i in range(len(self.columns)))
        lines += ["| " + " | ".join(rules) + " |"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines += [""] + [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"


def machine() -> list[str]:
    """What the numbers were measured on, one fact a line."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    version = re.search(r'__version__ = "(.*)"', (ROOT / "gateway" / "__init__.py").read_text())
    system = os.uname()
    return [
        f"CPU: {cpu[1] if cpu else system.machine}, {os.cpu_count()} cores",
        f"kernel: {system.sysname} {system.release}",
        f"Python {sys.version.split()[0]}, "
        + ", ".join(
            f"{name} {metadata.version(name)}" for name in (_runtime(), "aiohttp", "uvloop")
        ),
        f"gateway {version[1] if version else '?'}, commit {commit.stdout.strip() or 'none yet'}",
        f"niceness {os.nice(0)}, date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]


def _runtime() -> str:
    """The distribution that ONNX Runtime was installed by."""
    installed = {found.metadata["Name"] for found in metadata.distributions()}
    return "onnxruntime-gpu" if "onnxruntime-gpu" in installed else "onnxruntime"
