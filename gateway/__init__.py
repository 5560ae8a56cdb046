"""inference-gateway: ONNX models behind HTTP, batched in shared memory."""

__version__ = "0.1.0"
