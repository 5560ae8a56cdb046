"""Bytes to tensors and back: the Open Inference Protocol, TensorFlow Serving's REST, msgpack."""
