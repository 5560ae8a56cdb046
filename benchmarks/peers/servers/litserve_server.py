"""LitServe: raw bytes or JSON, batched by its own loop.

FastAPI hands ``decode_request`` the whole body where its parameter is annotated so; by default LitServe
parses JSON.
"""

from __future__ import annotations

from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response
from runtime import FORM, MAX_ROWS, PORT, WINDOW_S, Model

RAW = Annotated[bytes, Body(media_type="application/octet-stream")]


class JsonApi(litserve.LitAPI):
    """``{"x": [...]}``, which LitServe has parsed.

    Without annotations where LitServe looks at them: any would change its parser.
    """

    def setup(self, device: str) -> None:
        """Load the model, in LitServe's worker."""
        self._model = Model()

    def decode_request(self, request):
        """A request's row."""
        return np.asarray(request["x"], np.float32)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """One batch."""
        return self._model.run(x.reshape(len(x), *self._model.row_shape))

    def encode_response(self, output):
        """An answer's document."""
        return {"y": output.ravel().tolist()}


class RawApi(JsonApi):
    """Bodies that are tensors and nothing else."""

    def decode_request(self, request: Any) -> np.ndarray:
        """A request's row."""
        return np.frombuffer(request, np.float32)

    def encode_response(self, output: np.ndarray) -> Any:
        """An answer."""
        return Response(output.tobytes(), media_type="application/octet-stream")


# LitServe looks at these with inspect.signature, which gives strings for what is written above.
RawApi.decode_request.__annotations__["request"] = RAW
RawApi.encode_response.__annotations__["return"] = Response

if __name__ == "__main__":
    api = (JsonApi if FORM == "json" else RawApi)(
        max_batch_size=MAX_ROWS, batch_timeout=WINDOW_S, api_path="/inference"
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=PORT,
        generate_client_file=False,
        log_level="warning",
        num_api_servers=1,
    )
