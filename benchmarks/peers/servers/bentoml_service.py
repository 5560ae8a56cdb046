"""BentoML: raw bytes to a front service that calls the batching one, or JSON to the batching one.

A batchable API takes arrays, and arrays come in binary only between services: BentoML refuses pickled
bodies from outside. So binary bodies need two services. It has no setting for how long a batch waits.
"""

from __future__ import annotations

from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType
from runtime import MAX_ROWS, Model

QUIET = {"access": {"enabled": False}}

MAX_LATENCY_MS = 60_000
"""What a batch may take before requests are refused: never, as refusals are not what is measured."""


@bentoml.service(workers=1, traffic={"timeout": 60}, logging=QUIET)
class Batching:
    """Runs the model."""

    def __init__(self) -> None:
        self._model = Model()

    @bentoml.api(batchable=True, max_batch_size=MAX_ROWS, max_latency_ms=MAX_LATENCY_MS)
    def inference(self, x: np.ndarray) -> np.ndarray:
        """One batch: ``x`` [rows, elements]."""
        rows = np.ascontiguousarray(x, np.float32)
        return self._model.run(rows.reshape(len(rows), *self._model.row_shape))


@bentoml.service(workers=1, traffic={"timeout": 60}, logging=QUIET)
class Front:
    """Takes bodies that are tensors and nothing else."""

    batching = bentoml.depends(Batching)

    @bentoml.api
    async def inference(
        self, x: Annotated[bytes, ContentType("application/octet-stream")], /
    ) -> Annotated[bytes, ContentType("application/octet-stream")]:
        """One row."""
        row = np.frombuffer(x, np.float32)[None]
        return (await self.batching.to_async.inference(row)).tobytes()
