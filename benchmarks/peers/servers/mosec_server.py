"""Mosec: raw bytes through its own hooks, JSON by its default parser, msgpack by its mixin."""

from __future__ import annotations

import numpy as np
from mosec import Server, Worker
from mosec.mixin import MsgpackMixin
from runtime import FORM, MAX_ROWS, WINDOW_S, Model


class JsonWorker(Worker):
    """Batches of ``{"x": [...]}``, which Mosec has parsed."""

    def __init__(self) -> None:
        self._model = Model()

    def forward(self, data: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
        """One batch."""
        rows = [np.asarray(each["x"], np.float32) for each in data]
        return [{"y": row.ravel().tolist()} for row in self._model.run_rows(rows)]


class MsgpackWorker(MsgpackMixin, Worker):
    """Batches of ``{"x": bin}``."""

    def __init__(self) -> None:
        self._model = Model()

    def forward(self, data: list[dict[str, bytes]]) -> list[dict[str, bytes]]:
        """One batch."""
        rows = [np.frombuffer(each["x"], np.float32) for each in data]
        return [{"y": row.tobytes()} for row in self._model.run_rows(rows)]


class RawWorker(Worker):
    """Batches of bodies that are tensors and nothing else."""

    def __init__(self) -> None:
        self._model = Model()

    def deserialize(self, data: bytes) -> np.ndarray:
        """A request's row."""
        return np.frombuffer(data, np.float32)

    def serialize(self, data: np.ndarray) -> bytes:
        """An answer's body."""
        return data.tobytes()

    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        """One batch."""
        return list(self._model.run_rows(data))


WORKERS = {"raw": RawWorker, "json": JsonWorker, "msgpack": MsgpackWorker}

if __name__ == "__main__":
    server = Server()
    server.append_worker(
        WORKERS[FORM], num=1, max_batch_size=MAX_ROWS, max_wait_time=round(WINDOW_S * 1000)
    )
    server.run()
