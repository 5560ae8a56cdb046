"""From a model's settings to what its workers are told."""

from __future__ import annotations

import os
from pathlib import Path

from gateway.serving.cpus import usable_cpus, usable_memory_bytes
from gateway.serving.options import WorkerOptions
from gateway.serving.plan import Execution, LoadPlan
from gateway.settings import Instance, ModelSettings, ServerSettings
from gateway.store.place import STATE_FOLDER
from gateway.tensors import Padding

CACHE_FOLDER = Path(STATE_FOLDER) / "cache"
"""Where in the model repository optimised graphs are kept unless a setting says otherwise."""

Key = tuple[str, int, int]
"""A worker: model, version, seat."""


def load_plan(
    path: Path,
    settings: ModelSettings,
    server: ServerSettings,
    instance: Instance,
    memory_left_bytes: int,
) -> LoadPlan:
    """What one worker of a version is told to load.

    Args:
        path: the model file, ``<repository>/<model>/<version>/model.onnx``.
        settings: the model's.
        server: the server's.
        instance: the kind of worker.
        memory_left_bytes: of the server's budget.
    """
    samples = settings.warmup_samples
    return LoadPlan(
        path=os.fspath(path),
        execution=_execution(settings, server, instance),
        max_batch_size=settings.max_batch_size,
        allowed_batch_sizes=settings.allowed_batch_sizes,
        accept_batch_effects=settings.accept_batch_effects,
        padding=tuple(
            Padding(dim, padding.buckets, padding.side == "right", tuple(padding.values.items()))
            for dim, padding in settings.padding.items()
        ),
        warmup=settings.warmup,
        warmup_samples=None if samples is None else os.fspath(path.parent.parent / samples),
        memory_bytes=settings.memory_bytes,
        memory_left_bytes=memory_left_bytes,
        max_answer_bytes=server.max_answer_bytes,
    )


def worker_options(
    settings: ModelSettings,
    server: ServerSettings,
    instance: Instance,
    seats: int,
    seat: int,
    incarnation: int,
) -> WorkerOptions:
    """What one worker of a version is told besides what to load."""
    return WorkerOptions(
        seats=seats,
        seat=seat,
        incarnation=incarnation,
        cpus=instance.cpus,
        max_queue_delay_us=settings.max_queue_delay_us,
        orphan_grace_s=server.orphan_grace_s,
        log_level=server.log_level,
        log_format=server.log_format,
    )


def _execution(settings: ModelSettings, server: ServerSettings, instance: Instance) -> Execution:
    options = settings.session_options
    cache = server.cache_folder or server.model_repository / CACHE_FOLDER
    return Execution(
        device=instance.device,
        provider_options=tuple(instance.provider_options.items()),
        threads=instance.threads or default_threads(settings),
        inter_op_threads=options.inter_op_threads,
        execution_mode=options.execution_mode,
        graph_optimization=options.graph_optimization,
        memory_pattern=options.memory_pattern,
        cpu_arena=options.cpu_arena,
        config=tuple(options.config.items()),
        cache_folder=os.fspath(cache.absolute()) if settings.cache_optimized else None,
        cuda_graphs=instance.cuda_graphs,
    )


def default_threads(settings: ModelSettings) -> int:
    """Threads of a worker for which no setting says how many: the model's CPU workers share the CPUs."""
    workers = sum(spec.count for spec in settings.instances if spec.device == "cpu")
    return max(1, usable_cpus() // max(1, workers))


class MemoryBudget:
    """What all workers together may take. Counts; the workers themselves refuse what is too much.

    Args:
        total_bytes: the server's setting; None: what the machine or container has.
    """

    def __init__(self, total_bytes: int | None) -> None:
        self._total_bytes = total_bytes or usable_memory_bytes()
        self._taken: dict[Key, int] = {}

    def left_bytes(self) -> int:
        """What another worker may take."""
        return max(0, self._total_bytes - sum(self._taken.values()))

    def taken_bytes(self, key: Key) -> int:
        """What a worker takes; 0 for one that is not there."""
        return self._taken.get(key, 0)

    def take(self, key: Key, nbytes: int) -> int:
        """A worker takes so much: the size of its file while it loads, then what it was found to.

        Gives what the others had left for it, which may be less than it takes.
        """
        self.give_back(key)
        left_bytes = self.left_bytes()
        self._taken[key] = nbytes
        return left_bytes

    def give_back(self, key: Key) -> None:
        """A worker has ended."""
        self._taken.pop(key, None)
