"""The onnx package's own backend tests, served over HTTP. `run.py` runs all of them."""
