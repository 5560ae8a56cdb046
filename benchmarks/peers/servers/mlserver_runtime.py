"""MLServer: the runtime that its settings name. Tensors come as numbers, or as base64 in a BYTES input."""

from __future__ import annotations

import base64

import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from runtime import FORM, Model


class OnnxRuntime(MLModel):
    """Batches that MLServer's adaptive batching has merged."""

    async def load(self) -> bool:
        """Load the model."""
        self._onnx = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One batch."""
        (tensor,) = payload.inputs
        data = getattr(tensor.data, "root", tensor.data)
        if FORM == "base64":
            rows = np.frombuffer(b"".join(map(base64.b64decode, data)), np.float32)
        else:
            rows = np.asarray(data, np.float32)
        answers = self._onnx.run(rows.reshape(-1, *self._onnx.row_shape))
        if FORM == "base64":
            texts = [base64.b64encode(answer.tobytes()).decode() for answer in answers]
            output = ResponseOutput(
                name=self._onnx.output, shape=[len(texts)], datatype="BYTES", data=texts
            )
        else:
            output = ResponseOutput(
                name=self._onnx.output,
                shape=list(answers.shape),
                datatype="FP32",
                data=answers.ravel().tolist(),
            )
        return InferenceResponse(model_name=self.name, outputs=[output])
