"""Ray Serve: one replica, its own batching decorator, no access log."""

from __future__ import annotations

import os
import signal

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from runtime import MAX_ROWS, PORT, WINDOW_S, Model, read, write
from starlette.requests import Request
from starlette.responses import Response

QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


@serve.deployment(num_replicas=1, max_ongoing_requests=1024, logging_config=QUIET)
class Deployment:
    """The model."""

    def __init__(self) -> None:
        self._model = Model()

    @serve.batch(max_batch_size=MAX_ROWS, batch_wait_timeout_s=WINDOW_S)
    async def infer(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        """One batch."""
        return list(self._model.run_rows(rows))

    async def __call__(self, request: Request) -> Response:
        """One request."""
        return Response(write(await self.infer(read(await request.body()))))


if __name__ == "__main__":
    names = ("PEER_MODEL", "PEER_FORM", "PYTHONPATH", "ORT_DISABLE_TELEMETRY")
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=4,
        _temp_dir=os.environ["PEER_FOLDER"],
        runtime_env={"env_vars": {name: os.environ[name] for name in names}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config=QUIET)
    serve.run(Deployment.bind(), name="peer", route_prefix="/", logging_config=QUIET)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()
