"""A loop that does nothing but ``session.run``: what `saturation.py` and `peers.py` compare with.

    python bare.py MODEL

The model has one FP32 input, of a shape that is fixed but for the rows. Reads lines of batch size and
seconds, and answers each with rows a second and rows a CPU second.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import open_session


class BareLoop:
    """``session.run`` in a loop, in a process of its own: this file, with a pipe to it."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def rates(self, batch_size: int, seconds: float) -> tuple[float, float]:
        """Rows a second at this batch size, and rows a CPU second."""
        print(batch_size, seconds, file=self._process.stdin, flush=True)
        rate, cpu_rate = map(float, self._process.stdout.readline().split())
        return rate, cpu_rate

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(model: Path) -> None:
    """Answer lines of batch size and seconds with rows a second and a CPU second, until their end."""
    session = open_session(model)
    (taken,) = session.get_inputs()
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        batch_size, seconds = line.split()
        feed = {taken.name: rng.standard_normal((int(batch_size), *taken.shape[1:]), np.float32)}
        session.run(None, feed)
        rows, began, cpu, now = 0, time.perf_counter(), time.process_time(), 0.0
        while now - began < float(seconds):
            session.run(None, feed)
            rows += int(batch_size)
            now = time.perf_counter()
        print(rows / (now - began), rows / (time.process_time() - cpu), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
