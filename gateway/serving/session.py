"""An ONNX Runtime session: the only module of the serving side that imports onnxruntime.

Inputs are bound where the front end wrote them and outputs where it will read them, so nothing of fixed
size is copied here on the CPU. A binding costs 17-19 µs to make and 4 µs to run again, so bindings are
kept, by slot, rows and shape; slots are reused last-in first-out, which keeps that set small.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # wheels since 1.29 report to their maker by default

import onnxruntime as ort

from gateway.errors import LoadError
from gateway.protocols.call import show_name
from gateway.serving import graphcache, strings
from gateway.serving.geometry import SlotShape
from gateway.serving.onnxfile import ModelFacts
from gateway.serving.plan import Device, Execution
from gateway.tensors import BY_ORT, MAX_RANK, TensorSpec, element_count

Array = npt.NDArray[Any]
"""A tensor: raw numbers (BF16 as its 16 bits), or an object array of bytes for strings."""

LOG_FATAL_ONLY = 4
"""What fails is raised as well; ONNX Runtime's own log would quote clients' values."""

MAX_OPTIONAL_INPUTS = 16
"""Inputs with defaults that clients may send. Old exporters list every weight as such an input."""

MAX_TENSORS = 1024
"""Inputs and outputs of a model; bounds its signature and the records in shared memory."""

_STRING = 8
_BF16 = 16
"""ONNX's numbers of the types that NumPy lacks."""

_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_ORT_TEXT = re.compile(r"\[ONNXRuntimeError\] : \d+ : (\w+)")
_ORT_NODE = re.compile(r"while running (\w+) node")


class RunError(Exception):
    """The model failed on a batch. Clients may see ``public``; the text only where none is given."""

    def __init__(self, text: str, public: str | None = None) -> None:
        super().__init__(text)
        self.public = text if public is None else public

    @classmethod
    def from_runtime(cls, error: Exception) -> RunError:
        """From what ONNX Runtime raised: its texts may quote tensor values and paths."""
        text = str(error)
        code = _ORT_TEXT.search(text)
        node = _ORT_NODE.search(text)
        where = f" in a {node[1]} node" if node else ""
        return cls(text, f"ONNX Runtime failed ({code[1] if code else 'UNKNOWN'}){where}")


class ModelSession:
    """A model in ONNX Runtime. What it is served as is decided by the loader, not here.

    Args:
        path: the .onnx file.
        facts: what it says of itself.
        execution: how to run it; the device must really be available.

    Raises:
        LoadError: the file, the device or a tensor's type cannot be served; says why.
    """

    def __init__(self, path: Path, facts: ModelFacts, execution: Execution) -> None:
        ort.disable_telemetry_events()
        self._session = _open(path, facts, execution)
        count = len(self._session.get_inputs()) + len(self._session.get_outputs())
        if count > MAX_TENSORS:
            raise LoadError(f"it has {count} inputs and outputs, of {MAX_TENSORS} at most")
        self.inputs = tuple(_spec("input", arg, facts) for arg in self._session.get_inputs())
        self.outputs = tuple(_spec("output", arg, facts) for arg in self._session.get_outputs())
        if not self.outputs:
            raise LoadError("the model has no outputs")
        defaults = self._session.get_overridable_initializers()
        self.hidden_inputs = len(defaults) if len(defaults) > MAX_OPTIONAL_INPUTS else 0
        if not self.hidden_inputs:
            self.inputs += tuple(_spec("input", arg, facts, optional=True) for arg in defaults)
        self._specs = {spec.name: spec for spec in self.inputs}
        self._output_names = [spec.name for spec in self.outputs]
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = LOG_FATAL_ONLY
        # What an unset key means; ONNX Runtime 1.32's wrapper looks it up at each run, and finding it
        # unset costs a C++ exception: 40 µs.
        self._run_options.add_run_config_entry("gpu_graph_id", "0")

    def bind(self, shape: SlotShape, rows: int, inputs_at: int, outputs_at: int) -> ort.IOBinding:
        """Bind a slot's regions, given by address, for batches of `rows` rows.

        The binding points into mapped memory: it must be dropped before the lane is unmapped. Where
        `shape.outputs` is None the outputs are left to ONNX Runtime (`unbound_outputs`).
        """
        binding = self._session.io_binding()
        for p in shape.inputs:
            binding.bind_input(
                p.spec.name, "cpu", 0, _element(p.spec), p.dims(rows), inputs_at + p.offset
            )
        if shape.outputs is None:
            self._bind_no_output(binding)
        else:
            for p in shape.outputs:
                binding.bind_output(
                    p.spec.name, "cpu", 0, _element(p.spec), p.dims(rows), outputs_at + p.offset
                )
        return binding

    def _bind_no_output(self, binding: ort.IOBinding) -> None:
        for name in self._output_names:
            binding.bind_output(name, "cpu")

    def run(self, binding: ort.IOBinding) -> None:
        """Run a bound batch. Raises RunError when the model fails on it."""
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # ONNX Runtime raises classes of its own from C++
            raise RunError.from_runtime(error) from None

    def unbound_outputs(self, binding: ort.IOBinding) -> list[Array]:
        """The outputs of a run that were left to ONNX Runtime, in the signature's order.

        An output that is an input as well shows the input's memory: use them while that and the binding
        are there. The binding is used once: it would insist on the same shapes in a next run.
        """
        return [
            _copy(value, spec)
            for value, spec in zip(binding.get_outputs(), self.outputs, strict=True)
        ]

    def run_arrays(self, arrays: Mapping[str, Array]) -> list[Array]:
        """Run on arrays, by input name; optional ones may lack. Raises RunError."""
        texts = {name: array for name, array in arrays.items() if array.dtype == object}
        if texts and all(spec.datatype.onnx != _BF16 for spec in self.outputs):
            # Text that is not UTF-8, on either side, takes the long way.
            with suppress(UnicodeDecodeError):
                return _copies(self._run_text(arrays, texts))
        binding = self._session.io_binding()
        for name, array in arrays.items():
            if name in texts:
                binding.bind_ortvalue_input(name, _native(array))
            else:
                dims, at = list(array.shape), array.ctypes.data
                binding.bind_input(name, "cpu", 0, _element(self._specs[name]), dims, at)
        self._bind_no_output(binding)
        self.run(binding)
        return _copies(self.unbound_outputs(binding))

    def _run_text(self, arrays: Mapping[str, Array], texts: Mapping[str, Array]) -> list[Array]:
        """Run by copies, which is the only way that takes text. UnicodeDecodeError: not UTF-8."""
        feeds: dict[str, Any] = {}
        for name, array in arrays.items():
            if name in texts:
                feeds[name] = strings.as_text(array)
            elif self._specs[name].datatype.onnx == _BF16:
                feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BF16)
            else:
                feeds[name] = array
        try:
            outputs = self._session.run(self._output_names, feeds, self._run_options)
        except UnicodeDecodeError:
            raise
        except Exception as error:  # ONNX Runtime raises classes of its own from C++
            raise RunError.from_runtime(error) from None
        return [strings.as_bytes(np.asarray(o)) if o.dtype == object else o for o in outputs]


def _copies(arrays: list[Array]) -> list[Array]:
    """Arrays that show no memory of the inputs."""
    return [array.copy() for array in arrays]


def _native(array: Array) -> ort.OrtValue:
    """Strings of any bytes as ONNX Runtime's own tensor: the constant of a graph."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(
            strings.constant_graph(array), options, ["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        binding.bind_output("s", "cpu")
        session.run_with_iobinding(binding)
    except Exception as error:  # ONNX Runtime raises classes of its own from C++
        raise RunError.from_runtime(error) from None
    return binding.get_outputs()[0]


@functools.cache
def _native_is_readable() -> bool:
    """Whether ONNX Runtime's strings lie in memory as `strings.read_native` takes them to."""
    known = strings.as_array([b"\xff", b"\0" * 100, b""], (3,))
    value = _native(known)
    return np.array_equal(strings.read_native(value.data_ptr(), (3,)), known)


def _copy(value: ort.OrtValue, spec: TensorSpec) -> Array:
    """An output of ONNX Runtime's as an array of ours."""
    dims = tuple(value.shape())
    if spec.datatype.onnx == _STRING:
        try:
            return strings.as_bytes(value.numpy())
        except UnicodeDecodeError:
            if not _native_is_readable():
                raise RunError(
                    "strings that are not UTF-8 cannot be read from this build of ONNX Runtime"
                ) from None
            return strings.read_native(value.data_ptr(), dims)
    if spec.datatype.onnx == _BF16:
        nbytes = element_count(dims) * spec.datatype.itemsize
        raw = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""
        return np.frombuffer(raw, spec.datatype.dtype).reshape(dims)
    try:
        return np.ascontiguousarray(value.numpy()).reshape(dims)
    except ValueError:
        raise RunError(
            f"an output has dims that cannot be handed over ({len(dims)} of them)"
        ) from None


def _open(path: Path, facts: ModelFacts, execution: Execution) -> ort.InferenceSession:
    device = Device(execution.device)
    if hasattr(ort, "preload_dlls") and execution.device.startswith("cuda"):
        ort.preload_dlls()
    if device.provider not in ort.get_available_providers():
        raise LoadError(
            f"device {execution.device} needs {device.provider}, which this ONNX Runtime does not "
            f"have: install a build that has it (for CUDA 'inference-gateway[gpu]' in place of [cpu])"
        )
    session = _open_cached(path, facts, execution)
    if device.provider not in session.get_providers():
        # ONNX Runtime falls back to the CPU in silence.
        raise LoadError(
            f"device {execution.device}: {device.provider} did not load; are its driver and its "
            f"libraries there?"
        )
    return session


def _open_cached(path: Path, facts: ModelFacts, execution: Execution) -> ort.InferenceSession:
    """Open the optimised graph of an earlier load, else the model, keeping its optimised graph."""
    entry = None
    if execution.cache_folder is not None and execution.graph_optimization != "disabled":
        made_with = {"runtime": ort.__version__, **execution.shapes_graph()}
        entry = graphcache.entry(Path(execution.cache_folder), path, facts, made_with)
    if entry is None:
        return _start(path, execution)
    if graphcache.is_usable(entry):
        with suppress(LoadError):  # refused all the same: it is made again
            return _start(entry, execution, is_optimized=True)
    made = entry.with_suffix(f".{os.getpid()}")
    try:
        session = _start(path, execution, optimized=made)
        graphcache.keep(made, entry)
    except LoadError:
        session = _start(path, execution)  # not every provider's graph can be written down
    finally:
        with suppress(OSError):
            made.unlink(missing_ok=True)
    return session


def _start(
    path: Path,
    execution: Execution,
    *,
    is_optimized: bool = False,
    optimized: Path | None = None,
) -> ort.InferenceSession:
    """Open a graph; write it, once optimised, to ``optimized``."""
    device = Device(execution.device)
    providers: list[Any] = [
        (device.provider, device.own_options | dict(execution.provider_options))
    ]
    if device.provider != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    try:
        options = _options(execution)
        if is_optimized:
            options.graph_optimization_level = _LEVELS["disabled"]
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        return ort.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises classes of its own from C++
        code = _ORT_TEXT.search(str(error))
        raise LoadError(
            f"ONNX Runtime refused the model ({code[1] if code else 'UNKNOWN'})",
            " ".join(str(error).split()),
        ) from None


def _options(execution: Execution) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = execution.threads
    options.inter_op_num_threads = execution.inter_op_threads
    options.log_severity_level = LOG_FATAL_ONLY
    options.enable_mem_pattern = execution.memory_pattern
    options.enable_cpu_mem_arena = execution.cpu_arena
    options.graph_optimization_level = _LEVELS[execution.graph_optimization]
    if execution.execution_mode == "parallel":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    # An idle server sleeps: spinning pool threads would burn a core between batches.
    config = {
        "session.intra_op.allow_spinning": "0",
        "session.inter_op.allow_spinning": "0",
        **dict(execution.config),
    }
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def _spec(role: str, arg: Any, facts: ModelFacts, *, optional: bool = False) -> TensorSpec:
    datatype = BY_ORT.get(arg.type)
    if datatype is None:
        raise LoadError(
            f"{role} {show_name(arg.name)} is a {arg.type}: only tensors are served, of the "
            f"datatypes that the protocols have"
        )
    if not arg.shape and arg.name in facts.unranked:
        return TensorSpec(arg.name, datatype, None, optional)
    # A name may be empty and a number negative: neither says anything.
    shape = tuple(
        dim if (isinstance(dim, int) and dim >= 0) or (isinstance(dim, str) and dim) else None
        for dim in arg.shape
    )
    if len(shape) > MAX_RANK:
        raise LoadError(
            f"{role} {show_name(arg.name)} has {len(shape)} dims, of {MAX_RANK} at most"
        )
    return TensorSpec(arg.name, datatype, shape, optional)


def _element(spec: TensorSpec) -> Any:
    """What io_binding takes as an element type; BF16 has no NumPy dtype and goes by ONNX's number."""
    return spec.datatype.onnx if spec.datatype.onnx == _BF16 else spec.datatype.dtype


def runtime_facts() -> dict[str, Any]:
    """What this ONNX Runtime is, for operators, as plain values.

    Returns:
        ``version``; ``providers``, the execution providers of the build, best first; ``devices``, the
        hardware that they say they found. That a provider is listed does not mean that it loads.
    """
    ort.disable_telemetry_events()
    devices = (
        f"{found.ep_name}: {found.device.type.name} {found.device.vendor}".rstrip()
        for found in ort.get_ep_devices()
    )
    return {
        "version": ort.__version__,
        "providers": ort.get_available_providers(),
        "devices": list(dict.fromkeys(devices)),
    }
