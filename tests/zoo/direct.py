"""A run by ONNX Runtime itself, for every datatype that is served: what each answer is held against."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported, hence the order

import ml_dtypes
import numpy as np
import onnxruntime

from tests.zoo.building import MODEL_FILE, Arrays

NodeArg = onnxruntime.NodeArg
"""What ONNX Runtime says of an input or output: name, type and shape."""

FATAL_ONLY = 4

BFLOAT16 = 16
"""ONNX's number for the type, which NumPy lacks."""

_BFLOAT16_TEXT = "tensor(bfloat16)"


class DirectModel:
    """A model in this process: one thread, and nothing on standard error."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = FATAL_ONLY
        self.session = onnxruntime.InferenceSession(
            str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"]
        )
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = FATAL_ONLY
        self._outputs = self.session.get_outputs()
        tensors = [*self.session.get_inputs(), *self._outputs]
        self._has_bfloat16 = any(tensor.type == _BFLOAT16_TEXT for tensor in tensors)

    def run(self, inputs: Arrays) -> Arrays:
        """Every output. BYTES are object arrays of bytes, both ways; they must be UTF-8."""
        if self._has_bfloat16:
            return self._run_bound(inputs)
        names = [output.name for output in self._outputs]
        feed = {name: _text(array) for name, array in inputs.items()}
        arrays = self.session.run(names, feed, self._run_options)
        return {name: _bytes(array) for name, array in zip(names, arrays, strict=True)}

    def _run_bound(self, inputs: Arrays) -> Arrays:
        """By way of a binding, which takes bfloat16; ``run`` does not."""
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, _value(array))
        for output in self._outputs:
            binding.bind_output(output.name, "cpu")
        self.session.run_with_iobinding(binding, self._run_options)
        values = binding.get_outputs()
        return {o.name: _array(v) for o, v in zip(self._outputs, values, strict=True)}


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    if array.dtype != ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)


def _array(value: onnxruntime.OrtValue) -> np.ndarray:
    if value.data_type() != _BFLOAT16_TEXT:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(ml_dtypes.bfloat16).itemsize
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, ml_dtypes.bfloat16).reshape(shape)


def _mapped(array: np.ndarray, function) -> np.ndarray:
    """An object array of the function's results."""
    made = np.empty(array.shape, np.object_)
    made.reshape(-1)[:] = [function(element) for element in array.reshape(-1)]
    return made


def _text(array: np.ndarray) -> np.ndarray:
    return _mapped(array, bytes.decode) if array.dtype == np.object_ else array


def _bytes(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return _mapped(array, str.encode) if array.dtype == np.object_ else array


def assert_equal(answers: Arrays, expected: Arrays, rtol: float | None = None) -> None:
    """The same outputs with the same dtypes, shapes and values.

    Values agree bit for bit, any NaN with any NaN; with ``rtol``, floats may differ by that, relatively or
    absolutely.
    """
    assert answers.keys() == expected.keys()
    for name, array in expected.items():
        answer = answers[name]
        assert (answer.dtype, answer.shape) == (array.dtype, array.shape), name
        if array.dtype == np.object_:
            assert answer.tolist() == array.tolist(), name
        elif rtol is not None and _is_float(array):
            np.testing.assert_allclose(_wide(answer), _wide(array), rtol, rtol, err_msg=name)
        else:
            np.testing.assert_array_equal(_bits(answer), _bits(array), err_msg=name)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype == ml_dtypes.bfloat16 or array.dtype.kind == "f"


def _wide(array: np.ndarray) -> np.ndarray:
    """As FP64, which holds every other float; signalling NaNs warn when they become quiet ones."""
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def _bits(array: np.ndarray) -> np.ndarray:
    """The elements' bits as whole numbers, all NaNs alike."""
    if not _is_float(array):
        return array
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}").copy()
    bits[np.isnan(_wide(array).reshape(-1))] = np.iinfo(bits.dtype).max
    return bits.reshape(array.shape)
