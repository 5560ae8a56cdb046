"""What a worker is told to load, and how, and what it found out about it: as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gateway.tensors import Padding


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs: ``cpu``, ``cuda`` with an ordinal, or the name of an execution provider."""

    text: str

    @property
    def provider(self) -> str:
        """The name of ONNX Runtime's execution provider."""
        kind = self.text.partition(":")[0]
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind, kind)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU that the gateway drives itself."""
        return self.text.partition(":")[0] == "cuda"

    @property
    def ordinal(self) -> int:
        """The number of a GPU, counted as CUDA does."""
        return int(self.text.partition(":")[2])

    @property
    def own_options(self) -> dict[str, str]:
        """Options of the provider that follow from the device's name."""
        return {"device_id": str(self.ordinal)} if self.is_cuda else {}


@dataclass(frozen=True, slots=True)
class Execution:
    """How ONNX Runtime is to run a model; see `gateway.settings` for what each one bounds."""

    device: str = "cpu"
    provider_options: tuple[tuple[str, str], ...] = ()
    threads: int = 1
    inter_op_threads: int = 1
    execution_mode: str = "sequential"
    graph_optimization: str = "all"
    memory_pattern: bool = True
    cpu_arena: bool = True
    config: tuple[tuple[str, str], ...] = ()
    cache_folder: str | None = None
    cuda_graphs: bool = False

    @property
    def makes_threads(self) -> bool:
        """Whether a session has threads of its own, beside the one that runs it."""
        return self.threads != 1 or self.execution_mode == "parallel" or self.device != "cpu"

    def shapes_graph(self) -> dict[str, object]:
        """What of it decides about the optimised graph."""
        return {
            "device": self.device,
            "provider_options": sorted(self.provider_options),
            "graph_optimization": self.graph_optimization,
            "config": sorted(self.config),
        }


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A version's file and how to serve it.

    Attributes:
        path: the .onnx file.
        execution: how to run it.
        max_batch_size: rows a batch; 0: one request at a time; None: decided from the graph.
        allowed_batch_sizes: what batches are padded to; empty: any number of rows.
        accept_batch_effects: batch although rows were found to change each other's answers.
        padding: by symbolic dim.
        warmup: run the model before it takes requests.
        warmup_samples: an .npz file to warm up with.
        memory_bytes: most memory that loading may take; None: no limit of the model's own.
        memory_left_bytes: what the server has left; None: nobody counts.
        max_answer_bytes: most bytes of a run's outputs that do not fit a slot.
    """

    path: str
    execution: Execution = Execution()
    max_batch_size: int | None = None
    allowed_batch_sizes: tuple[int, ...] = ()
    accept_batch_effects: bool = False
    padding: tuple[Padding, ...] = ()
    warmup: bool = True
    warmup_samples: str | None = None
    memory_bytes: int | None = None
    memory_left_bytes: int | None = None
    max_answer_bytes: int = 1 << 28

    @property
    def asked_batch_size(self) -> int | None:
        """Rows a batch that the settings ask for; 0: none; None: they leave it to the graph."""
        return self.allowed_batch_sizes[-1] if self.allowed_batch_sizes else self.max_batch_size

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        wire = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return wire | {
            "execution": asdict(self.execution),
            "padding": [padding.to_wire() for padding in self.padding],
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> LoadPlan:
        """The inverse of `to_wire`."""
        execution = dict(wire["execution"])
        for name in ("provider_options", "config"):
            execution[name] = tuple((key, value) for key, value in execution[name])
        return cls(
            **wire
            | {
                "execution": Execution(**execution),
                "allowed_batch_sizes": tuple(wire["allowed_batch_sizes"]),
                "padding": tuple(Padding.from_wire(padding) for padding in wire["padding"]),
            }
        )


def no_memory(needed_bytes: int, left_bytes: int) -> str:
    """Why a model is not served that takes more than the server's budget has left."""
    return (
        f"it takes {needed_bytes} bytes of memory and the server has {left_bytes} left: raise the "
        f"server's memory_bytes or serve fewer models"
    )


@dataclass(frozen=True, slots=True)
class Understanding:
    """What loading found out about a model, in words for operators.

    Attributes:
        batching: how its requests are batched, and why.
        outputs: how its outputs travel, and why.
        notes: what an operator should know or may want to change.
        resident_bytes: memory of the worker once the model is warm, ONNX Runtime's own included.
    """

    batching: str
    outputs: str
    notes: tuple[str, ...] = ()
    resident_bytes: int = 0

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a message between processes."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Understanding:
        """The inverse of `to_wire`."""
        return cls(**wire | {"notes": tuple(wire["notes"])})
