"""An environment of its own for each peer, with pinned versions, made on first use."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from report import ROOT

from peers.processes import last_line

ENVIRONMENTS = ROOT / "benchmarks" / ".peers"

DEBIAN_PYTHON = "/usr/bin/python3.11"
"""PyTriton's Triton embeds libpython3.11 and does not start under Pythons that pyenv has built."""

INSTALL_S = 1800
"""What pip may take."""

ORT = "onnxruntime==1.32.0"

_REQUIRES = """
import importlib.metadata, sys
for line in importlib.metadata.requires(sys.argv[1]):
    if "extra ==" not in line:
        print(line)
"""


class Missing(Exception):
    """A peer cannot be had here; the text says what to install."""


@dataclass(frozen=True)
class Environment:
    """What pip installs, and into which Python.

    Attributes:
        pins: requirements, the peer's own first.
        python: to make it with; by default the one that runs this.
        loosened: requirements of the first pin that cannot be met as they are written, taken without
            their versions.
    """

    name: str
    pins: tuple[str, ...]
    python: str = sys.executable
    loosened: tuple[str, ...] = ()

    @property
    def bin(self) -> Path:
        """The folder of its programs."""
        return ENVIRONMENTS / self.name / "bin"

    def make(self) -> None:
        """Make it unless it is there as it is described here. Missing when that is not possible."""
        stamp, wanted = ENVIRONMENTS / self.name / "made", repr(self)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        if not Path(self.python).is_file():
            raise Missing(f"it needs {self.python}: apt install python3.11 python3.11-venv")
        print(f"installing {', '.join(self.pins)} in {ENVIRONMENTS / self.name}", flush=True)
        shutil.rmtree(ENVIRONMENTS / self.name, ignore_errors=True)
        _call([self.python, "-m", "venv", str(ENVIRONMENTS / self.name)])
        first, *others = self.pins
        if self.loosened:
            self._pip("--no-deps", first)
            name = first.partition("==")[0]
            others += loosened(
                _call([str(self.bin / "python"), "-c", _REQUIRES, name]), self.loosened
            )
        else:
            others.append(first)
        self._pip(*others)
        stamp.write_text(wanted)

    def _pip(self, *arguments: str) -> None:
        _call([str(self.bin / "python"), "-m", "pip", "install", "--quiet", *arguments])


def loosened(requires: str, names: tuple[str, ...]) -> list[str]:
    """Requirements, one a line, of which those of ``names`` lose their versions."""
    lines = []
    for line in requires.splitlines():
        name = re.match(r"[\w.-]+", line)
        if name:
            lines.append(name[0] if name[0] in names else line)
    return lines


def _call(command: list[str]) -> str:
    """What it printed. Missing, with its last error, when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise Missing(f"it could not be installed within {INSTALL_S} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else last_line(done.stdout + done.stderr)
        raise Missing(f"it could not be installed: {reason}")
    return done.stdout


def need_program(name: str) -> None:
    """Missing unless it is on the path."""
    if shutil.which(name) is None:
        raise Missing(f"it needs {name}: apt install {name}")
