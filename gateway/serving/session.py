"""A loaded model: the only module of the serving side that imports onnxruntime.

Inputs are bound where the front end wrote them and outputs where it will read them, so nothing of fixed
size is copied here on the CPU. A binding costs 17-19 µs to make and 4 µs to run again, so bindings are
kept, by slot, rows and shape; slots are reused last-in first-out, which keeps that set small.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # wheels since 1.29 report to their maker by default

import onnxruntime as ort

from gateway.errors import LoadError
from gateway.serving.geometry import Dims, Shape
from gateway.tensors import BY_ORT, MAX_RANK, Signature, TensorSpec

PROBE_SEED = 20
"""Of the random rows that the split test compares."""

PROBE_DIM = 4
"""What the split test takes for a dim that varies; where the model refuses it, nothing is learned."""

DEFAULT_MAX_BATCH_SIZE = 64
"""Rows a batch where the graph allows batching and no setting says otherwise."""

LOG_FATAL_ONLY = 4
"""What fails is raised as well; ONNX Runtime's own log would quote clients' values."""

_ORT_TEXT = re.compile(r"\[ONNXRuntimeError\] : \d+ : (\w+)")
_ORT_NODE = re.compile(r"while running (\w+) node")


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs: ``cpu``, or ``cuda`` and an ordinal."""

    kind: str
    ordinal: int

    @classmethod
    def parse(cls, text: str) -> Device:
        """From the setting's ``cpu`` or ``cuda:N``."""
        kind, _, ordinal = text.partition(":")
        return cls(kind, int(ordinal or 0))

    @property
    def provider(self) -> str:
        """The name of ONNX Runtime's execution provider."""
        return "CUDAExecutionProvider" if self.kind == "cuda" else "CPUExecutionProvider"


class RunError(Exception):
    """The model failed on a batch. ``public`` may be shown to a client; the text itself may not."""

    def __init__(self, text: str, public: str) -> None:
        super().__init__(text)
        self.public = public

    @classmethod
    def from_runtime(cls, error: Exception) -> RunError:
        """From what ONNX Runtime raised: its texts may quote tensor values and paths."""
        text = str(error)
        code = _ORT_TEXT.search(text)
        node = _ORT_NODE.search(text)
        where = f" in a {node[1]} node" if node else ""
        return cls(text, f"ONNX Runtime failed ({code[1] if code else 'UNKNOWN'}){where}")


class ModelSession:
    """An ONNX Runtime session and the model's signature.

    Args:
        path: the .onnx file.
        device: where to run; must really be available.
        threads: intra-op threads.
        max_batch_size: rows a batch, or None to decide from the graph.

    Raises:
        LoadError: the file, the device or the signature cannot be served; says why.
    """

    def __init__(
        self, path: Path, device: Device, threads: int, max_batch_size: int | None
    ) -> None:
        ort.disable_telemetry_events()
        self._session = _open(path, device, threads)
        self.signature = _signature(self._session, max_batch_size)
        self._decided_by_graph = max_batch_size is None
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = LOG_FATAL_ONLY
        # What an unset key means; ONNX Runtime 1.32's wrapper looks it up at each run, and finding it
        # unset costs a C++ exception: 40 µs.
        self._run_options.add_run_config_entry("gpu_graph_id", "0")

    def bind(self, shape: Shape, rows: int, inputs_at: int, outputs_at: int) -> ort.IOBinding:
        """Bind a slot's regions, given by address, for batches of `rows` rows.

        The binding points into mapped memory: it must be dropped before the lane is unmapped. Where
        `shape.outputs` is None the outputs are left to ONNX Runtime (`unbound_outputs`).
        """
        binding = self._session.io_binding()
        for p in shape.inputs:
            binding.bind_input(
                p.spec.name, "cpu", 0, _element(p.spec), [rows, *p.inner], inputs_at + p.offset
            )
        if shape.outputs is None:
            for spec in self.signature.outputs:
                binding.bind_output(spec.name, "cpu")
        else:
            for p in shape.outputs:
                binding.bind_output(
                    p.spec.name, "cpu", 0, _element(p.spec), [rows, *p.inner], outputs_at + p.offset
                )
        return binding

    def run(self, binding: ort.IOBinding) -> None:
        """Run a bound batch. Raises RunError when the model fails on it."""
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # ONNX Runtime raises classes of its own from C++
            raise RunError.from_runtime(error) from None

    def unbound_outputs(self, binding: ort.IOBinding) -> list[np.ndarray[Any, Any]]:
        """The outputs of a run that were left to ONNX Runtime, in the signature's order.

        It keeps them in the binding and would insist on the same shapes in a next run: such a binding
        is used once.
        """
        return [np.ascontiguousarray(value.numpy()) for value in binding.get_outputs()]

    def warm_up(self) -> bool:
        """Run zeros at one row and at the most rows; False where a variable dim leaves no shape to try.

        Raises:
            LoadError: the model fails on them.
        """
        if self._inner_dims() is None:
            return False
        for rows in sorted({1, self.signature.max_batch_size}):
            zeros = [
                np.zeros([rows, *inner], spec.datatype.dtype)
                for spec, inner in zip(self.signature.inputs, self._inner_dims() or (), strict=True)
            ]
            try:
                self._run_arrays(zeros)
            except RunError as error:
                raise LoadError(
                    f"the warm-up with {rows} rows of zeros failed: {error.public}", str(error)
                ) from None
        return True

    def check_rows_are_independent(self) -> None:
        """Hold rows run together against the same rows run alone, unless a setting said they batch.

        A dim that varies by name looks like a batch in many graphs that mix rows (a sequence, a mean
        over the first dim). Requests of different clients must not be batched then.

        Raises:
            LoadError: the rows' answers depend on their mates.
        """
        if not self._decided_by_graph:
            return
        dims = [
            [d if isinstance(d, int) else PROBE_DIM for d in spec.shape[1:]]
            for spec in self.signature.inputs
        ]
        rng = np.random.default_rng(PROBE_SEED)
        together = [
            _sample(rng, [2, *inner], spec)
            for spec, inner in zip(self.signature.inputs, dims, strict=True)
        ]
        try:
            both = self._run_arrays(together)
            alone = [self._run_arrays([a[i : i + 1].copy() for a in together]) for i in (0, 1)]
        except RunError:
            return  # the sample is outside the model's domain: it says nothing
        for output, first, second in zip(both, *alone, strict=True):
            joined = np.concatenate([first, second])
            if joined.shape != output.shape or not np.allclose(
                joined, output, rtol=1e-2, atol=1e-3, equal_nan=True
            ):
                raise LoadError(
                    "its rows' answers depend on the other rows of a batch, so they cannot be "
                    "batched; if that is acceptable, set max_batch_size in its config.yaml"
                )

    def _inner_dims(self) -> Dims | None:
        """The inputs' dims without the batch, None where one varies."""
        dims = tuple(tuple(spec.wire_shape[1:]) for spec in self.signature.inputs)
        return None if any(d < 0 for inner in dims for d in inner) else dims

    def _run_arrays(self, arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Run on arrays by way of a binding, which takes every datatype (``run`` takes no BF16)."""
        binding = self._session.io_binding()
        for spec, array in zip(self.signature.inputs, arrays, strict=True):
            binding.bind_input(
                spec.name, "cpu", 0, _element(spec), list(array.shape), array.ctypes.data
            )
        for spec in self.signature.outputs:
            binding.bind_output(spec.name, "cpu")
        self.run(binding)
        if any(spec.datatype.name == "BF16" for spec in self.signature.outputs):
            return []  # NumPy has no such type to show it in
        return self.unbound_outputs(binding)


def _sample(rng: np.random.Generator, shape: list[int], spec: TensorSpec) -> np.ndarray[Any, Any]:
    """Small random values that most models accept: 0 or 1 where they are whole numbers."""
    if spec.datatype.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.datatype.dtype)
    return rng.integers(0, 2, shape).astype(spec.datatype.dtype)


def _open(path: Path, device: Device, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL_ONLY
    # An idle server sleeps: spinning pool threads would burn a core between batches.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.kind == "cuda":
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        providers.insert(0, (device.provider, {"device_id": str(device.ordinal)}))
    if device.provider not in ort.get_available_providers():
        raise LoadError(
            f"device {device.kind}:{device.ordinal} needs {device.provider}, which this ONNX Runtime "
            f"does not have: install 'inference-gateway[gpu]' in place of [cpu]"
        )
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises classes of its own from C++
        code = _ORT_TEXT.search(str(error))
        raise LoadError(
            f"ONNX Runtime refused the model ({code[1] if code else 'UNKNOWN'})",
            " ".join(str(error).split()),
        ) from None
    if device.provider not in session.get_providers():
        # ONNX Runtime falls back to the CPU in silence.
        raise LoadError(
            f"device {device.kind}:{device.ordinal}: {device.provider} did not load; are the driver "
            f"and the CUDA libraries there?"
        )
    return session


def _signature(session: ort.InferenceSession, max_batch_size: int | None) -> Signature:
    inputs = tuple(_spec("input", arg) for arg in session.get_inputs())
    outputs = tuple(_spec("output", arg) for arg in session.get_outputs())
    if not inputs:
        raise LoadError("the model has no inputs")
    if max_batch_size is None:
        batch_dims = {spec.shape[0] for spec in (*inputs, *outputs)}
        if len(batch_dims) != 1 or not all(isinstance(d, str) for d in batch_dims):
            raise LoadError(
                "the first dims of inputs and outputs are not one symbolic dim, so it is unclear "
                "whether rows may be batched: set max_batch_size in the model's config.yaml if so"
            )
        max_batch_size = DEFAULT_MAX_BATCH_SIZE
    batch = inputs[0].shape[0]
    for spec in outputs:
        if isinstance(batch, str) and batch in spec.shape[1:]:
            raise LoadError(
                f"output '{spec.name}' has the batch dim '{batch}' inside, too: a row's answer would "
                f"hold the other rows of its batch"
            )
    return Signature(inputs, outputs, max_batch_size)


def _spec(role: str, arg: Any) -> TensorSpec:
    datatype = BY_ORT.get(arg.type)
    if datatype is None:
        raise LoadError(f"{role} '{arg.name}' is a {arg.type}: only tensors are served")
    if datatype.numpy is None:
        raise LoadError(f"{role} '{arg.name}' holds strings, which are not served")
    shape = tuple(dim if isinstance(dim, int | str) else None for dim in arg.shape)
    if len(shape) > MAX_RANK:
        raise LoadError(f"{role} '{arg.name}' has {len(shape)} dims, of {MAX_RANK} at most")
    if not shape or isinstance(shape[0], int):
        raise LoadError(
            f"{role} '{arg.name}' has shape {list(shape)}: its first dim must be the batch, and variable"
        )
    return TensorSpec(arg.name, datatype, shape)


def _element(spec: TensorSpec) -> Any:
    """What io_binding takes as an element type; BF16 has no NumPy dtype and goes by ONNX's number."""
    return spec.datatype.onnx if spec.datatype.name == "BF16" else spec.datatype.dtype
