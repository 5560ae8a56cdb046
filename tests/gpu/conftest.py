"""Tests that need an NVIDIA GPU and onnxruntime-gpu; elsewhere they are skipped, and say why."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.serving import onnxfile
from gateway.serving.pipeline import Pipeline
from gateway.serving.plan import Execution
from gateway.serving.session import ModelSession, runtime_facts
from gateway.tensors import Signature

HERE = Path(__file__).parent

NO_TF32 = (("use_tf32", "0"),)
"""Products with all of FP32's bits, as a CPU makes them."""


@functools.cache
def why_not() -> str | None:
    """Why there is nothing to test here; None: there is."""
    if "CUDAExecutionProvider" not in runtime_facts()["providers"]:
        return (
            "needs onnxruntime-gpu: pip install 'inference-gateway[gpu]' in an environment "
            "without onnxruntime"
        )
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, check=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "needs an NVIDIA GPU: nvidia-smi shows none"
    return None if found.stdout.strip() else "needs an NVIDIA GPU: nvidia-smi shows none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if reason := why_not():
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Served:
    """One model on both devices."""

    cpu: ModelSession
    gpu: ModelSession
    signature: Signature
    pipeline: Pipeline


@pytest.fixture
def served(tmp_path, benchmark_models):
    """Opens a model of benchmarks/models.py on the GPU and on the CPU."""

    def make(name: str, *, sizes: tuple[int, ...] = (), graphs: bool = False) -> Served:
        path = tmp_path / f"{name}.onnx"
        benchmark_models.MODELS[name][0](path)
        facts = onnxfile.examine(path)
        execution = Execution("cuda:0", provider_options=NO_TF32, cuda_graphs=graphs)
        gpu, cpu = ModelSession(path, facts, execution), ModelSession(path, facts, Execution())
        assert gpu.is_on_gpu
        signature = Signature(gpu.inputs, gpu.outputs, 32, sizes)
        pipeline = Pipeline(gpu, gpu.gpu, signature, pytest.fail)
        if graphs:
            assert pipeline.capture_graphs() > 0
        return Served(cpu, gpu, signature, pipeline)

    return make
