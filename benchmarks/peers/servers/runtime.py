"""What the peers' servers share: their settings, a session with the options of ours, forms of a body."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np

PORT = int(os.environ.get("PEER_PORT", "0"))
FORM = os.environ.get("PEER_FORM", "raw")

MAX_ROWS = 32
"""Most rows of a batch, in every peer."""

WINDOW_S = 0.002
"""How long a batch waits for more rows, in every peer that has such a setting."""


class Model:
    """An ONNX model of one input and one output, run by one thread that does not spin."""

    def __init__(self) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        (given,) = self._session.get_inputs()
        (made,) = self._session.get_outputs()
        self.input, self.output = given.name, made.name
        self.row_shape = tuple(given.shape[1:])
        self.answer_shape = tuple(made.shape[1:])

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Answers [rows, ...] of rows [rows, ...], both FP32."""
        return self._session.run(None, {self.input: batch})[0]

    def run_rows(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The same for rows that came one by one, each of any shape of the right size."""
        return self.run(np.stack(rows).reshape(len(rows), *self.row_shape))


def read(body: bytes) -> np.ndarray:
    """The row of a request's body, flat FP32."""
    if FORM == "json":
        return np.asarray(json.loads(body)["x"], np.float32)
    if FORM == "msgpack":
        import msgpack

        body = msgpack.unpackb(body)["x"]
    return np.frombuffer(body, np.float32)


def write(row: np.ndarray) -> bytes:
    """The body of the answer, in the form of the request."""
    if FORM == "json":
        return json.dumps({"y": row.ravel().tolist()}).encode()
    if FORM == "msgpack":
        import msgpack

        return msgpack.packb({"y": row.tobytes()})
    return row.tobytes()
