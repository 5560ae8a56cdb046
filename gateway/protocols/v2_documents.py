"""The v2 documents that describe the server and its models, as plain values for `jsontext.dumps`.

Protocol: KServe's `open-inference-protocol` for server and model metadata; Triton's model
configuration, statistics and model repository extensions, whose field names are used where
perf_analyzer and dashboards look for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway import __version__
from gateway.tensors import Signature, TensorSpec

SERVER_NAME = "inference-gateway"

EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
"""The extensions of v2 that this server has. perf_analyzer looks for ``statistics``."""

PLATFORM = "onnxruntime_onnx"


@dataclass(frozen=True, slots=True)
class Spent:
    """How often something was done and the time it took altogether."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """The batches of one size."""

    batch_size: int
    compute_input: Spent
    compute_infer: Spent
    compute_output: Spent


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """What one model version has done since it was loaded.

    ``inference_count`` counts rows, ``execution_count`` batches; the rest count requests.
    """

    name: str
    version: str
    last_inference_ms: int = 0  # since the epoch; 0: never
    inference_count: int = 0
    execution_count: int = 0
    success: Spent = Spent()
    fail: Spent = Spent()
    queue: Spent = Spent()
    compute_input: Spent = Spent()
    compute_infer: Spent = Spent()
    compute_output: Spent = Spent()
    batches: Sequence[BatchStatistics] = ()


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One model version in the repository; ``version`` is empty for a model without any."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


def server_metadata() -> dict[str, Any]:
    """The document of ``GET /v2``."""
    return {"name": SERVER_NAME, "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(name: str, versions: Sequence[str], signature: Signature) -> dict[str, Any]:
    """The document of ``GET /v2/models/{m}``; the batch dim is shown as -1."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_tensor_metadata(spec) for spec in signature.inputs],
        "outputs": [_tensor_metadata(spec) for spec in signature.outputs],
    }


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype.name, "shape": spec.wire_shape}


def model_config(
    name: str,
    signature: Signature,
    *,
    max_queue_delay_us: int,
    instances: Iterable[tuple[str, int]],
    version_policy: Mapping[str, Any] | Literal["all"],
) -> dict[str, Any]:
    """The document of ``GET /v2/models/{m}/config``; dims leave out the batch dim, where there is one.

    Args:
        name: of the model.
        signature: of the version.
        max_queue_delay_us: how long a worker may hold a batch back.
        instances: device ("cpu", "cuda:N") and count of each group of workers.
        version_policy: {"latest": N}, {"specific": [N, …]} or "all", as in the settings.
    """
    batched = signature.is_batched
    config: dict[str, Any] = {
        "name": name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": _version_policy(version_policy),
        "max_batch_size": signature.max_batch_size,
        "input": [_tensor_config(spec, batched) for spec in signature.inputs],
        "output": [_tensor_config(spec, batched) for spec in signature.outputs],
        "instance_group": [
            _instance_group(f"{name}_{position}", device, count)
            for position, (device, count) in enumerate(instances)
        ],
        "default_model_filename": "model.onnx",
        "model_transaction_policy": {"decoupled": False},
        "response_cache": {"enable": False},
    }
    if batched:
        config["dynamic_batching"] = {
            "preferred_batch_size": [],  # a batch closes when a worker takes it
            "max_queue_delay_microseconds": max_queue_delay_us,
        }
    return config


def _tensor_config(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    datatype = spec.datatype.name
    has_rows = batched and not spec.optional and spec.shape is not None
    config: dict[str, Any] = {
        "name": spec.name,
        "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}",
        "dims": spec.wire_shape[1:] if has_rows else spec.wire_shape,
    }
    if spec.optional:
        config["optional"] = True
    return config


def _instance_group(name: str, device: str, count: int) -> dict[str, Any]:
    kind, _, number = device.partition(":")
    return {
        "name": name,
        "kind": "KIND_GPU" if kind == "cuda" else "KIND_CPU",
        "count": count,
        "gpus": [int(number)] if number else [],
    }


def _version_policy(policy: Mapping[str, Any] | Literal["all"]) -> dict[str, Any]:
    if policy == "all":
        return {"all": {}}
    if "latest" in policy:
        return {"latest": {"num_versions": policy["latest"]}}
    return {"specific": {"versions": list(policy["specific"])}}


def model_stats(statistics: Iterable[ModelStatistics]) -> dict[str, Any]:
    """The document of ``GET /v2/models/stats`` and of one model's ``/stats``."""
    return {"model_stats": [_statistics_of(entry) for entry in statistics]}


def _statistics_of(entry: ModelStatistics) -> dict[str, Any]:
    return {
        "name": entry.name,
        "version": entry.version,
        "last_inference": entry.last_inference_ms,
        "inference_count": entry.inference_count,
        "execution_count": entry.execution_count,
        "inference_stats": {
            "success": _spent(entry.success),
            "fail": _spent(entry.fail),
            "queue": _spent(entry.queue),
            "compute_input": _spent(entry.compute_input),
            "compute_infer": _spent(entry.compute_infer),
            "compute_output": _spent(entry.compute_output),
            "cache_hit": _spent(Spent()),  # there is no cache
            "cache_miss": _spent(Spent()),
        },
        "batch_stats": [
            {
                "batch_size": batch.batch_size,
                "compute_input": _spent(batch.compute_input),
                "compute_infer": _spent(batch.compute_infer),
                "compute_output": _spent(batch.compute_output),
            }
            for batch in entry.batches
        ],
        "memory_usage": [],
    }


def _spent(spent: Spent) -> dict[str, int]:
    return {"count": spent.count, "ns": spent.ns}


def repository_index(entries: Iterable[IndexEntry]) -> list[dict[str, str]]:
    """The document of ``POST /v2/repository/index``; fields that are empty are left out."""
    return [
        {
            field: value
            for field, value in (
                ("name", entry.name),
                ("version", entry.version),
                ("state", entry.state),
                ("reason", entry.reason),
            )
            if value
        }
        for entry in entries
    ]
