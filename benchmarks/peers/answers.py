"""Whether a server answers rightly: many requests at once, each with a row of its own."""

from __future__ import annotations

import http.client
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from harness import open_session

from peers.workloads import Tensors, Wire

REQUESTS = 64
IN_FLIGHT = 32

TIMEOUT_S = 60.0
"""What one answer may take."""

NO_ANSWER = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
"""What asking a server raises that does not answer well."""

TOLERANCE = 1e-4
"""Relative and absolute: rows are computed in batches of other sizes than ours."""


@dataclass(frozen=True)
class Verdict:
    """How many answers were wrong, and why others were none."""

    wrong: int
    failures: Counter[str]

    @property
    def good(self) -> bool:
        """Whether all answers are right."""
        return not self.wrong and not self.failures

    def __str__(self) -> str:
        """In words."""
        failed = sum(self.failures.values())
        parts = [f"{REQUESTS - self.wrong - failed} of {REQUESTS} answers right"]
        if self.wrong:
            parts.append(f"{self.wrong} wrong")
        parts += [f"{count} failed: {reason}" for reason, count in self.failures.items()]
        return ", ".join(parts)


class Oracle:
    """A model's answers, each computed by ONNX Runtime for its row alone."""

    def __init__(self, model: Path, tensors: Tensors) -> None:
        self.tensors = tensors
        self.rows = tensors.rows(REQUESTS)
        session = open_session(model)
        self.answers = [
            session.run(None, {tensors.input: row[None]})[0].ravel() for row in self.rows
        ]

    def judge(self, port: int, path: str, wire: Wire) -> Verdict:
        """Send all rows, so many at a time, and compare what comes back."""
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            outcomes = list(pool.map(partial(self._outcome, port, path, wire), range(REQUESTS)))
        failures = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
        return Verdict(outcomes.count(False), failures)

    def _outcome(self, port: int, path: str, wire: Wire, index: int) -> bool | str:
        """Whether one answer is right, or why there is none."""
        try:
            answer = ask(port, path, wire, self.tensors, self.rows[index])
        except NO_ANSWER as error:
            return f"{type(error).__name__} {error}"[:200]
        wanted = self.answers[index]
        return answer.shape == wanted.shape and np.allclose(answer, wanted, TOLERANCE, TOLERANCE)


def ask(port: int, path: str, wire: Wire, tensors: Tensors, row: np.ndarray) -> np.ndarray:
    """The answer of one row. ValueError when it is not a 200; OSError when there is none."""
    request = wire.request(path, tensors, row)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(request.method, request.path, request.body, dict(request.headers))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {body[:80].decode(errors='replace')}")
    return wire.answer(body, int(response.headers.get("Inference-Header-Content-Length", 0)))
