"""Opening a model in ONNX Runtime: its device, its options, and the cache of optimised graphs."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # wheels since 1.29 report to their maker by default

import onnxruntime as ort

from gateway.errors import LoadError
from gateway.serving import cuda, graphcache
from gateway.serving.onnxfile import ModelFacts
from gateway.serving.plan import Device, Execution

LOG_FATAL_ONLY = 4
"""What fails is raised as well; ONNX Runtime's own log would quote clients' values."""

ERROR_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : (\w+)")
"""What of ONNX Runtime's error texts anybody may see."""

_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


def open_session(
    path: Path, facts: ModelFacts, execution: Execution
) -> tuple[ort.InferenceSession, cuda.Gpu | None]:
    """Open a model on its device.

    Returns:
        the session, and the GPU on whose stream it computes; None where it is not CUDA's.

    Raises:
        LoadError: the file or the device cannot be used; says why.
    """
    device = Device(execution.device)
    if device.provider not in ort.get_available_providers():
        raise LoadError(
            f"device {execution.device} needs {device.provider}, which this ONNX Runtime does not "
            f"have: install a build that has it (for CUDA 'inference-gateway[gpu]' in place of [cpu])"
        )
    gpu = _open_gpu(device) if device.is_cuda else None
    session = _open_cached(path, facts, execution, gpu)
    if device.provider not in session.get_providers():
        # ONNX Runtime falls back to the CPU in silence.
        raise LoadError(
            f"device {execution.device}: {device.provider} did not load; are its driver and its "
            f"libraries there?"
        )
    return session, gpu


def _open_gpu(device: Device) -> cuda.Gpu:
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    try:
        return cuda.Gpu.open(device.ordinal)
    except cuda.CudaError as error:
        raise LoadError(f"device {device.text} cannot be used: {error}") from None


def _open_cached(
    path: Path, facts: ModelFacts, execution: Execution, gpu: cuda.Gpu | None
) -> ort.InferenceSession:
    """Open the optimised graph of an earlier load, else the model, keeping its optimised graph."""
    entry = None
    if execution.cache_folder is not None and execution.graph_optimization != "disabled":
        made_with = {"runtime": ort.__version__, **execution.shapes_graph()}
        entry = graphcache.entry(Path(execution.cache_folder), path, facts, made_with)
    if entry is None:
        return _start(path, execution, gpu)
    if graphcache.is_usable(entry):
        with suppress(LoadError):  # refused all the same: it is made again
            return _start(entry, execution, gpu, is_optimized=True)
    made = entry.with_suffix(f".{os.getpid()}")
    try:
        session = _start(path, execution, gpu, optimized=made)
        graphcache.keep(made, entry)
    except LoadError:
        session = _start(path, execution, gpu)  # not every provider's graph can be written down
    finally:
        with suppress(OSError):
            made.unlink(missing_ok=True)
    return session


def _start(
    path: Path,
    execution: Execution,
    gpu: cuda.Gpu | None,
    *,
    is_optimized: bool = False,
    optimized: Path | None = None,
) -> ort.InferenceSession:
    """Open a graph; write it, once optimised, to ``optimized``."""
    device = Device(execution.device)
    provider_options = device.own_options | dict(execution.provider_options)
    if gpu is not None:
        provider_options["user_compute_stream"] = str(gpu.compute_stream)
        if execution.cuda_graphs:
            provider_options["enable_cuda_graph"] = "1"
    providers: list[Any] = [(device.provider, provider_options)]
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
        code = ERROR_CODE.search(str(error))
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
