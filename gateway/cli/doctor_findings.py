"""What ``gateway doctor`` makes of what it found: problems, and what to do about them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.cli.doctor_facts import Facts, Kernels, Limits, Runtime
from gateway.control.inspection import Load, Survey
from gateway.tensors import Signature, TensorSpec

FEW_OPEN_FILES = 4096
"""Below it a server runs out of descriptors early: each connection takes one."""

MAX_NAMED = 4
"""Names that one finding lists; graphs have hundreds."""

# Not the words that YAML takes for true, false and null.
_PLAIN_KEY = re.compile(r"(?!(?i:yes|no|on|off|true|false|null)$)[A-Za-z_]\w*", re.ASCII)

Severity = Literal["error", "warning", "note"]
"""error: a server would not start, or not serve the model; warning: it works badly; note: worth knowing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem: how bad, of what (installation, machine, repository, a model), what, what to do."""

    severity: Severity
    about: str
    problem: str
    advice: str


def of_installation(facts: Facts) -> Iterator[Finding]:
    """Problems that do not depend on any model."""
    yield from _of_kernels(facts.kernels)
    yield from _of_runtime(facts.runtime, facts.kernels)
    yield from _of_limits(facts.limits)
    devices, runtime = facts.devices, facts.runtime
    if (
        devices.nvidia
        and runtime.onnxruntime is not None
        and "CUDAExecutionProvider" not in runtime.execution_providers
    ):
        yield Finding(
            "note",
            "machine",
            "it has an NVIDIA GPU, and this ONNX Runtime is built for the CPU alone",
            "to use the GPU: pip uninstall -y onnxruntime, pip install 'inference-gateway[gpu]', and "
            "instances: [{device: cuda:0}] in a model's config.yaml",
        )
    if runtime.system.endswith("x86_64") and "avx2" not in devices.cpu_features:
        yield Finding(
            "note",
            "machine",
            "the CPU has no AVX2, or its virtual machine hides it: models run several times slower",
            "choose another machine type, or let the hypervisor pass the CPU's features on",
        )


def _of_kernels(kernels: Kernels) -> Iterator[Finding]:
    if kernels.error is not None:
        yield Finding(
            "error",
            "installation",
            f"the compiled kernels do not load: {kernels.error}",
            "install the gateway again with this Python; in a checkout: pip install -e .",
        )
    if kernels.build == "debug":
        yield Finding(
            "warning",
            "installation",
            "the kernels are a debug build, with checks that cost speed",
            "install the gateway again without GATEWAY_CYTHON_DEBUG in the environment",
        )


def _of_runtime(runtime: Runtime, kernels: Kernels) -> Iterator[Finding]:
    brought_by = runtime.onnxruntime_distributions
    if len(brought_by) > 1:
        yield Finding(
            "error",
            "installation",
            f"{' and '.join(brought_by)} are installed over each other: they share one module",
            "uninstall them all (pip uninstall -y NAME), then install one: "
            "pip install 'inference-gateway[cpu]', or [gpu] for NVIDIA",
        )
    if runtime.onnxruntime_error is not None and kernels.error is None:
        is_absent = not brought_by
        yield Finding(
            "error",
            "installation",
            "ONNX Runtime is not installed, so models were not loaded"
            if is_absent
            else f"ONNX Runtime is not usable, so models were not loaded: {runtime.onnxruntime_error}",
            "pip install 'inference-gateway[cpu]', or [gpu] for NVIDIA"
            if is_absent
            else "install it again: pip install --force-reinstall 'inference-gateway[cpu]', or [gpu]",
        )
    for name, version in (("aiohttp", runtime.aiohttp), ("uvloop", runtime.uvloop)):
        if version is None:
            yield Finding(
                "error", "installation", f"{name} cannot be imported", "install the gateway again"
            )
    if runtime.aiohttp is not None and not runtime.aiohttp_c_parser:
        yield Finding(
            "warning",
            "installation",
            "aiohttp reads HTTP in Python instead of C, which is several times slower",
            "unset AIOHTTP_NO_EXTENSIONS; if it is not set, install a binary wheel of aiohttp: "
            "pip install --force-reinstall --only-binary aiohttp aiohttp",
        )


def _of_limits(limits: Limits) -> Iterator[Finding]:
    soft, hard = limits.open_files_soft, limits.open_files_hard
    if soft is not None and soft < FEW_OPEN_FILES:
        up_to = "" if hard is None else f", to at most {hard} without root"
        yield Finding(
            "warning",
            "machine",
            f"a process may open {soft} files, and each connection is one",
            f"raise it with ulimit -n before the start{up_to}, or by LimitNOFILE=65536 in a "
            "systemd unit",
        )
    missing = [
        name
        for name, is_there in (
            ("memfds cannot be sealed against writing (Linux 5.1)", limits.memfd_sealing),
            ("pidfd_open does not work (Linux 5.3)", limits.pidfd),
        )
        if not is_there
    ]
    for problem in missing:
        yield Finding(
            "error",
            "machine",
            problem,
            "use a newer kernel; in a sandbox or container, let its seccomp profile allow it",
        )


def of_repository(survey: Survey) -> Iterator[Finding]:
    """Problems that are seen without loading a model."""
    for text in survey.errors:
        yield Finding("error", "repository", text, "correct it: a server does not start with it")
    for entry in survey.models:
        if not entry.versions:
            yield Finding(
                "warning",
                entry.name,
                "it has no usable version, so it is not served",
                f"put its file at {entry.name}/1/model.onnx",
            )
    if not survey.chosen and not survey.errors:
        yield Finding(
            "error",
            "repository",
            "it has no model that can be served",
            "name the folder above those of the models, laid out as <model>/<version>/model.onnx "
            "with versions from 1 on",
        )


def of_loads(loads: Sequence[Load], limits: Limits, budget_bytes: int | None) -> Iterator[Finding]:
    """Problems of models that were loaded, or were tried to.

    Args:
        loads: one for each version and kind of worker.
        limits: the machine's.
        budget_bytes: the server's setting ``memory_bytes``; None: all that there is.
    """
    for load in loads:
        yield from _of_load(load)
    yield from _of_threads(loads, limits.cpus_usable)
    needed = sum(
        load.instance.count * load.understanding.resident_bytes
        for load in loads
        if load.understanding is not None
    )
    budget = budget_bytes or limits.memory_usable_bytes
    if needed > budget:
        yield Finding(
            "error",
            "repository",
            f"all workers together take {in_bytes(needed)}, the server may take {in_bytes(budget)}",
            "serve fewer models, versions or workers, or raise the server's memory_bytes",
        )
    if budget > limits.memory_usable_bytes:
        yield Finding(
            "warning",
            "machine",
            f"the server's memory_bytes ({in_bytes(budget)}) is more than this machine or container "
            f"has ({in_bytes(limits.memory_usable_bytes)})",
            "lower it, or leave it out",
        )


def name_of(load: Load) -> str:
    """The version that was loaded, for people."""
    return f"{load.entry.name} version {load.version}"


def in_bytes(count: int) -> str:
    """A number of bytes for people."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count} bytes"


def _about(load: Load) -> str:
    """The version, and the kind of worker where it has several."""
    where = f" on {load.instance.device}" if len(load.entry.settings.instances) > 1 else ""
    return name_of(load) + where


def _of_load(load: Load) -> Iterator[Finding]:
    if load.signature is None or load.understanding is None:
        hint = "SIGKILL may be the kernel's doing for want of memory (see dmesg); " * (
            "SIGKILL" in load.reason
        )
        yield Finding(
            "error",
            _about(load),
            load.reason,
            f"{hint}until it is mended: version_policy without it, or serve --no-exit-on-error",
        )
        return
    signature, batching = load.signature, load.understanding.batching
    if not signature.is_batched and load.entry.settings.max_batch_size != 0:
        advice = _batching_advice(signature, batching)
        if advice is not None:
            yield Finding("warning", _about(load), f"served {batching}", advice)
    yield from _of_padding(load, signature)
    yield from _of_outputs(load, signature, load.understanding.outputs)


def _batching_advice(signature: Signature, batching: str) -> str | None:
    """How a model that is served one request at a time could be batched; None where it cannot be."""
    required = [spec for spec in signature.inputs if not spec.optional]
    if not required:
        return None
    every = (*required, *signature.outputs)
    if any(not spec.shape or isinstance(spec.shape[0], int) for spec in every):
        return (
            "export it again with a dynamic batch axis: the first dim of every input and output "
            "symbolic, all by one name; give inputs that are not per row a default"
        )
    firsts = {spec.shape[0] for spec in every if spec.shape}
    if len(firsts) > 1 or None in firsts:
        return (
            "if the first dims are the batch, set max_batch_size (say 32) in its config.yaml, or "
            "export it again with one name for all of them"
        )
    if any(firsts & set(spec.shape[1:]) for spec in every if spec.shape):
        return "export it again with another name for the dims that are not the batch"
    if "accept_batch_effects" in batching:
        return (
            "if the rows belong to each other, leave it so; if answers only differ a little, as in "
            "int8 graphs, accept_batch_effects: true in its config.yaml batches them"
        )
    if "no made-up input" in batching:
        return (
            "if its rows are independent, which then is not tested, set max_batch_size (say 32) in "
            "its config.yaml"
        )
    return "export it again so that it runs on any number of rows and answers each of them with one"


def _of_padding(load: Load, signature: Signature) -> Iterator[Finding]:
    if not signature.is_batched:
        return
    required = [spec for spec in signature.inputs if not spec.optional]
    texts = [spec for spec in (*required, *signature.outputs) if spec.datatype.numpy is None]
    unpaddable = {padding.dim for padding in signature.padding} | set(_inner_symbols(texts))
    dims = [dim for dim in _inner_symbols(required) if dim not in unpaddable]
    if not dims:
        return
    buckets = "{buckets: [32, 64, 128, 256]}"
    example = ", ".join(f"{_key(dim)}: {buckets}" for dim in dims[:MAX_NAMED])
    yield Finding(
        "note",
        _about(load),
        f"requests that differ in {_listed(dims)} do not share batches",
        f"if padding with zeros does not change its answers, in its config.yaml: padding: {{{example}}}",
    )


def _of_outputs(load: Load, signature: Signature, outputs: str) -> Iterator[Finding]:
    has_strings = any(s.datatype.numpy is None for s in (*signature.inputs, *signature.outputs))
    if has_strings or not outputs.startswith("copied"):
        return  # strings always are
    yield Finding(
        "note",
        _about(load),
        f"its outputs are {outputs}",
        "this matters for large outputs only; there, export it again with outputs whose dims are "
        "fixed or named as dims of the inputs",
    )


def _of_threads(loads: Sequence[Load], usable_cpus: int) -> Iterator[Finding]:
    """More threads than CPUs: of one version, a mistake; of all together, a matter of their traffic."""
    threads = dict[str, int]()
    for load in loads:
        if load.instance.device == "cpu":
            version = name_of(load)
            threads[version] = threads.get(version, 0) + load.threads * load.instance.count
    too_many = {version: count for version, count in threads.items() if count > usable_cpus}
    for version, count in too_many.items():
        yield Finding(
            "warning",
            version,
            f"its workers have {count} threads together, and {_cpus(usable_cpus)} usable",
            "in its config.yaml, lower threads or count of instances until count × threads fits",
        )
    total = sum(threads.values())
    if not too_many and total > usable_cpus:
        yield Finding(
            "note",
            "machine",
            f"the workers of all versions have {total} threads, and {_cpus(usable_cpus)} usable",
            "well if few are busy at a time; otherwise set threads under instances in config.yaml",
        )


def _inner_symbols(specs: Iterable[TensorSpec]) -> list[str]:
    """The named dims of a row, once each."""
    dims = [dim for spec in specs for dim in (spec.shape or ())[1:] if isinstance(dim, str)]
    return list(dict.fromkeys(dims))


def _key(name: str) -> str:
    """A name as a key of a YAML file."""
    return name if _PLAIN_KEY.fullmatch(name) else json.dumps(name)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:MAX_NAMED]) + more


def _cpus(count: int) -> str:
    return "1 CPU is" if count == 1 else f"{count} CPUs are"
