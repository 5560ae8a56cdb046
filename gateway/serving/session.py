"""An ONNX Runtime session; only this and `session_opening` import onnxruntime on the serving side.

Inputs are bound where the front end wrote them and outputs where it will read them, so nothing of fixed
size is copied here on the CPU. A binding costs 17-19 µs to make and 4 µs to run again, so bindings are
kept, by slot, rows and shape; slots are reused last-in first-out, which keeps that set small.

A GPU has memory of its own. ONNX Runtime copies an input that is bound elsewhere when it is bound, not when
it is run: such bindings are for one run. `pipeline` binds the GPU's memory instead, and copies itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # wheels since 1.29 report to their maker by default

import onnxruntime as ort

from gateway.errors import LoadError
from gateway.protocols.call import show_name
from gateway.serving import cuda, strings
from gateway.serving.devicememory import Fragment, Workspace
from gateway.serving.geometry import SlotShape
from gateway.serving.onnxfile import ModelFacts
from gateway.serving.plan import Execution
from gateway.serving.session_opening import ERROR_CODE, LOG_FATAL_ONLY, open_session
from gateway.tensors import BY_ORT, MAX_RANK, TensorSpec, element_count

Array = npt.NDArray[Any]
"""A tensor: raw numbers (BF16 as its 16 bits), or an object array of bytes for strings."""

MAX_OPTIONAL_INPUTS = 16
"""Inputs with defaults that clients may send. Old exporters list every weight as such an input."""

MAX_TENSORS = 1024
"""Inputs and outputs of a model; bounds its signature and the records in shared memory."""

NO_GRAPH = -1
"""Among numbers of CUDA graphs, which are positive: capture none and replay none."""

GPU_FAILED = "the GPU failed"
"""What clients are told of an error of CUDA's, whose text may hold addresses."""

_STRING = 8
_BF16 = 16
"""ONNX's numbers of the types that NumPy lacks."""

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
        code = ERROR_CODE.search(text)
        node = _ORT_NODE.search(text)
        where = f" in a {node[1]} node" if node else ""
        return cls(text, f"ONNX Runtime failed ({code[1] if code else 'UNKNOWN'}){where}")


@dataclass(frozen=True, slots=True)
class _Copied:
    """A slot that is run by way of the GPU's memory, all of it waited for: what `ModelSession.bind` gives.

    What the model does not write of its outputs stays as it was in the slot, as on a CPU.
    """

    on_gpu: ort.IOBinding
    slot: Fragment
    workspace: Workspace


Binding: TypeAlias = Any
"""A binding of ONNX Runtime's, or a `_Copied`."""


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
        self._session, self.gpu = open_session(path, facts, execution)
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
        self._run_options = _run_options(NO_GRAPH)
        self._launch_options = functools.lru_cache(maxsize=None)(
            functools.partial(_run_options, is_awaited=False)
        )
        self._scratch = None if self.gpu is None else Workspace(self.gpu)
        self._ordinal = 0 if self.gpu is None else self.gpu.ordinal

    @functools.cached_property
    def is_in_place(self) -> bool:
        """Whether the device reads and writes this process's memory, so that bindings can be kept."""
        return all(is_host for is_host, _ in self._locations())

    @functools.cached_property
    def is_on_gpu(self) -> bool:
        """Whether all inputs and outputs are the GPU's, and it computes on the stream that it was given.

        ONNX Runtime does some models' arithmetic on the CPU, such as that of shapes.
        """
        if self.gpu is None or not all(is_device for _, is_device in self._locations()):
            return False
        options = self._session.get_provider_options().get("CUDAExecutionProvider", {})
        return bool(options.get("user_compute_stream") == str(self.gpu.compute_stream))

    def _locations(self) -> Iterator[tuple[bool, bool]]:
        """Of each input and output, whether it is in the CPU's memory, and whether in a device's own."""
        session = self._session
        for memory in (*session.get_input_memory_infos(), *session.get_output_memory_infos()):
            is_host = memory.name.lower() == "cpu"
            yield is_host, not is_host and memory.device_mem_type.name == "DEFAULT"

    def bind(self, shape: SlotShape, rows: int, inputs_at: int, outputs_at: int) -> Binding:
        """Bind a slot's regions, given by address, for batches of `rows` rows.

        The binding points into mapped memory: it must be dropped before the lane is unmapped. It is for
        one run unless the session `is_in_place`. Where `shape.outputs` is None the outputs are left to
        ONNX Runtime (`unbound_outputs`).
        """
        if self._scratch is None or not self.runs_on_gpu(shape):
            return self._bind("cpu", 0, shape, rows, inputs_at, outputs_at)
        slot = Fragment(shape, rows, inputs_at, outputs_at)
        on_gpu = self.bind_on_gpu(shape, rows, *self._scratch.place(shape))
        return _Copied(on_gpu, slot, self._scratch)

    def runs_on_gpu(self, shape: SlotShape) -> bool:
        """Whether batches of this shape can be bound to the GPU's memory: for `bind_on_gpu`."""
        is_known = shape.outputs is not None and not any(p.spec.optional for p in shape.inputs)
        return self.is_on_gpu and is_known

    def bind_on_gpu(
        self, shape: SlotShape, rows: int, inputs_at: int, outputs_at: int
    ) -> ort.IOBinding:
        """Bind addresses of the GPU's memory, laid out by `shape`, for `launch`; to be kept."""
        return self._bind("cuda", self._ordinal, shape, rows, inputs_at, outputs_at)

    def _bind(
        self,
        device: str,
        ordinal: int,
        shape: SlotShape,
        rows: int,
        inputs_at: int,
        outputs_at: int,
    ) -> ort.IOBinding:
        binding = self._session.io_binding()
        for p in shape.inputs:
            element, at = _element(p.spec), inputs_at + p.offset
            binding.bind_input(p.spec.name, device, ordinal, element, p.dims(rows), at)
        if shape.outputs is None:
            self._bind_no_output(binding)
            return binding
        for p in shape.outputs:
            element, at = _element(p.spec), outputs_at + p.offset
            binding.bind_output(p.spec.name, device, ordinal, element, p.dims(rows), at)
        return binding

    def _bind_no_output(self, binding: ort.IOBinding) -> None:
        for name in self._output_names:
            binding.bind_output(name, "cpu")

    def run(self, binding: Binding) -> None:
        """Run a bound batch. Raises RunError when the model fails on it."""
        if isinstance(binding, _Copied):
            self._run_copied(binding)
            return
        if not self.is_in_place:
            binding.synchronize_inputs()  # they were copied when they were bound
        self._run(binding, self._run_options)

    def launch(self, binding: ort.IOBinding, graph: int = NO_GRAPH) -> None:
        """Queue a run of what `bind_on_gpu` bound on the GPU's compute stream.

        Args:
            binding: what to run.
            graph: the number of the CUDA graph to capture, or to replay if it was; it belongs to this
                binding's addresses and dims.

        Raises:
            RunError: the model fails on it. What fails later shows when the stream is waited for.
        """
        self._run(binding, self._launch_options(graph))

    def _run(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime raises classes of its own from C++
            raise RunError.from_runtime(error) from None

    def _run_copied(self, copied: _Copied) -> None:
        workspace, slot = copied.workspace, copied.slot
        gpu, parts = workspace.gpu, (slot,)
        try:
            workspace.copy_former_outputs(slot.shape, parts)
            workspace.copy_in(slot.shape, parts, slot.rows)
            gpu.wait_in(gpu.compute_stream, workspace.copied_in)
            self._run(copied.on_gpu, self._run_options)
            gpu.record(workspace.computed, gpu.compute_stream)
            workspace.copy_out(slot.shape, parts)
            gpu.drain()
        except cuda.CudaError as error:
            raise RunError(str(error), GPU_FAILED) from None

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


def _run_options(graph: int, *, is_awaited: bool = True) -> ort.RunOptions:
    options = ort.RunOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    # ONNX Runtime 1.32's wrapper looks it up at each run, and finding it unset costs a C++ exception:
    # 40 µs. Unset, it would be 0, and where CUDA graphs are on, the first run would be captured.
    options.add_run_config_entry("gpu_graph_id", str(graph))
    if not is_awaited:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


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
