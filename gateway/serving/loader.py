"""From a model file to a session that is safe to serve, and to what was understood of it.

Runs in the worker, so whatever a file does to its reader it does to nobody else. In this order: the file
is examined (`onnxfile`), ONNX Runtime opens it, rows are tested for independence (`batching`), outputs
for being written where they are bound, and the model is warmed up at every size it will be run at.
"""

from __future__ import annotations

import itertools
import math
import os
import resource
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gateway.errors import LoadError
from gateway.protocols.call import show_name
from gateway.serving import batching, geometry, inplace, onnxfile, strings
from gateway.serving.onnxfile import ModelFacts
from gateway.serving.plan import LoadPlan, Understanding, no_memory
from gateway.serving.samples import Arrays, Sample
from gateway.serving.session import ModelSession, RunError
from gateway.tensors import Signature, TensorSpec

MAX_WARMUP_SHAPES = 64
"""Combinations of buckets that are warmed up, the smallest first; the others are met at run time."""

_UNREADABLE = (
    *(OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error),
    RuntimeError,  # encrypted, or compressed in a way of which Python knows nothing
    TypeError,  # one array, not an archive of them
    *(SyntaxError, tokenize.TokenError, OverflowError),  # an array's header
)
"""What reading an .npz file may raise."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A session, its signature as it will be served, and what was understood."""

    session: ModelSession
    signature: Signature
    understanding: Understanding


def load(plan: LoadPlan, on_opened: Callable[[], object]) -> Loaded:
    """Open a model, find out how to serve it, and warm it up.

    Args:
        plan: file and settings.
        on_opened: called once ONNX Runtime has the model, before it is first run.

    Raises:
        LoadError: it cannot be served; says why.
    """
    path = Path(plan.path)
    facts = onnxfile.examine(path)
    _check_size(plan, facts)
    _limit_memory(plan)
    try:
        session = ModelSession(path, facts, plan.execution)
        signature, why = batching.declared(session, plan)
        _check_padding(signature)
        on_opened()
        signature, whole_because, sample = batching.tested(session, signature, plan, facts.ops)
        copied_because = inplace.why_not(session, signature, facts, sample)
        signature = replace(signature, describes_outputs=copied_because is not None)
        notes = list(_notes(session, whole_because, plan))
        notes += _warm_up(session, signature, plan, sample)
    except (MemoryError, LoadError) as error:
        raise _explained(error, plan) from None
    resident = _memory_bytes()
    if plan.memory_left_bytes is not None and resident > plan.memory_left_bytes:
        raise LoadError(no_memory(resident, plan.memory_left_bytes))
    outputs = inplace.in_words(signature, copied_because)
    return Loaded(
        session,
        signature,
        Understanding(whole_because or why, outputs, tuple(notes), resident),
    )


# Memory


def _check_size(plan: LoadPlan, facts: ModelFacts) -> None:
    nbytes = facts.file_bytes + facts.external_bytes
    if plan.memory_bytes is not None and nbytes > plan.memory_bytes:
        raise LoadError(
            f"its files hold {nbytes} bytes, memory_bytes in its config.yaml allows "
            f"{plan.memory_bytes}"
        )
    if plan.memory_left_bytes is not None and nbytes > plan.memory_left_bytes:
        raise LoadError(no_memory(nbytes, plan.memory_left_bytes))


def _limit_memory(plan: LoadPlan) -> None:
    """Let allocations beyond the budget fail in this process instead of hurting the others."""
    if plan.memory_bytes is None:
        return
    limit = _status_bytes("VmData") + plan.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _explained(error: MemoryError | LoadError, plan: LoadPlan) -> LoadError:
    """The error; where it looks like the budget's doing, that is said."""
    text = error.detail if isinstance(error, LoadError) else str(error)
    is_memory = isinstance(error, MemoryError) or batching.lacks_memory(text)
    if is_memory and plan.memory_bytes is not None:
        return LoadError(
            f"loading it takes more memory than memory_bytes in its config.yaml "
            f"({plan.memory_bytes}) allows",
            text,
        )
    return error if isinstance(error, LoadError) else LoadError("there is not enough memory", text)


def _memory_bytes() -> int:
    """Memory of this process that no other shares."""
    return _status_bytes("RssAnon")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


# Padding


def _check_padding(signature: Signature) -> None:
    """LoadError where the settings pad what the graph does not have, or what cannot be padded."""
    by_name = {spec.name: spec for spec in signature.inputs}
    for padding in signature.padding:
        users = [
            spec
            for spec in (*signature.inputs, *signature.outputs)
            if spec.shape is not None and padding.dim in geometry.inner_of(signature, spec)
        ]
        if not any(spec.name in by_name for spec in users):
            symbols = sorted(
                {dim for s in signature.inputs for dim in s.shape or () if isinstance(dim, str)}
            )
            raise LoadError(
                f"padding names the dim {show_name(padding.dim)}, which no input has within a row; symbolic "
                f"dims of the inputs: {', '.join(map(show_name, symbols)) or 'none'}"
            )
        for spec in users:
            if spec.datatype.numpy is None:
                raise LoadError(
                    f"{show_name(spec.name)} has the padded dim {show_name(padding.dim)} and holds strings"
                )
        for name, value in padding.values:
            if name not in by_name:
                raise LoadError(
                    f"padding of {show_name(padding.dim)} names the input {show_name(name)}, unknown here"
                )
            _check_value(by_name[name], value)


def _check_value(spec: TensorSpec, value: float) -> None:
    """LoadError where the input's datatype has no such value."""
    if spec.datatype.numpy is None:
        raise LoadError(f"input {show_name(spec.name)} holds strings: it cannot be padded")
    dtype = spec.datatype.dtype
    if spec.datatype.name == "BF16" or dtype.kind == "f":
        largest = np.finfo(np.float32 if dtype.kind != "f" else dtype).max
        if math.isfinite(value) and abs(value) > largest:
            raise LoadError(
                f"input {show_name(spec.name)} is {spec.datatype.name}: it cannot hold {value}"
            )
        return
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if not math.isfinite(value) or value != int(value):
        raise LoadError(
            f"input {show_name(spec.name)} is {spec.datatype.name}: it cannot hold {value}"
        )
    if not low <= value <= high:
        raise LoadError(
            f"input {show_name(spec.name)} is {spec.datatype.name}: it cannot hold {int(value)}"
        )


# Warm-up


def _notes(session: ModelSession, whole_because: str | None, plan: LoadPlan) -> Iterator[str]:
    if whole_because is not None and plan.asked_batch_size:
        yield "its settings ask for batches, which its answers do not allow"
    if session.hidden_inputs:
        yield (
            f"{session.hidden_inputs} inputs have defaults, which clients cannot override: "
            f"they look like weights"
        )


def _warm_up(
    session: ModelSession, signature: Signature, plan: LoadPlan, sample: Sample | None
) -> list[str]:
    """Run the model at every size it will be run at; what an operator should know of it.

    Raises:
        LoadError: it fails on the samples that its settings name, or on any input at all.
    """
    if plan.warmup_samples is not None and plan.warmup:
        _run_samples(session, Path(plan.warmup_samples), Path(plan.path).parent.parent)
        return []
    if sample is None:
        if _takes_anything(signature):
            raise LoadError("the model fails on every input that was tried at its warm-up")
        return ["not warmed up: no made-up input ran; warmup_samples can name some that do"]
    if not plan.warmup:
        return []
    sizes = signature.allowed_batch_sizes or tuple(sorted({1, signature.max_batch_size or 1}))
    for rows, padded in itertools.product(sizes, _padded(signature, sample)):
        try:
            session.run_arrays(padded.arrays(rows))
        except RunError as error:
            raise LoadError(
                f"the warm-up with {rows} rows failed: {error.public}", str(error)
            ) from None
    return []


def _takes_anything(signature: Signature) -> bool:
    """Whether any input should run: of fixed dims, and no whole numbers that may be indices or sizes."""
    skip = int(signature.is_batched)
    return all(
        spec.datatype.numpy is not None
        and (spec.datatype.name == "BF16" or spec.datatype.dtype.kind == "f")
        and spec.shape is not None
        and all(isinstance(dim, int) for dim in spec.shape[skip:])
        for spec in signature.inputs
    )


def _padded(signature: Signature, sample: Sample) -> Iterator[Sample]:
    """The sample at every combination of buckets."""
    symbols = [padding.dim for padding in signature.padding]
    every = itertools.product(*(padding.buckets for padding in signature.padding))
    for lengths in itertools.islice(every, MAX_WARMUP_SHAPES):
        yield _with_lengths(signature, sample, dict(zip(symbols, lengths, strict=True)))


def _with_lengths(signature: Signature, sample: Sample, lengths: Mapping[str, int]) -> Sample:
    dims = []
    for spec, inner in zip(sample.inputs, sample.dims, strict=True):
        declared = () if spec.shape is None else geometry.inner_of(signature, spec)
        changed = list(inner)
        for axis, symbol in enumerate(declared):
            if isinstance(symbol, str):
                changed[axis] = lengths.get(symbol, changed[axis])
        dims.append(tuple(changed))
    return replace(sample, dims=tuple(dims))


def _run_samples(session: ModelSession, path: Path, folder: Path) -> None:
    """Run the arrays of an .npz file in the model's folder.

    Raises:
        LoadError: they cannot be read, are not there, or the model fails on them.
    """
    try:
        # NumPy leaves a file that it opened itself open where it is no archive.
        with _open_samples(path, folder) as opened, np.load(opened, allow_pickle=False) as file:
            found: Arrays = {name: file[name] for name in file.files}
    except _UNREADABLE as error:
        raise LoadError(
            "warmup_samples cannot be read: expected an .npz file", str(error)
        ) from None
    specs = {spec.name: spec for spec in session.inputs}
    unknown = sorted(found.keys() - specs.keys())
    missing = sorted(s.name for s in session.inputs if not s.optional and s.name not in found)
    if unknown or missing:
        raise LoadError(
            f"warmup_samples must hold the model's inputs: {len(unknown)} of its arrays are none, "
            f"missing: {', '.join(map(show_name, missing)) or 'none'}"
        )
    try:
        session.run_arrays({name: _as_input(specs[name], array) for name, array in found.items()})
    except RunError as error:
        raise LoadError(f"the warm-up failed: {error.public}", str(error)) from None


def _open_samples(path: Path, folder: Path) -> BinaryIO:
    """LoadError: it leads out of the folder or is no file. OSError, RuntimeError: it cannot be opened."""
    target = path.resolve(strict=True)
    if not target.is_relative_to(folder.resolve(strict=True)):
        raise LoadError("warmup_samples leads out of the model's folder")
    # A named pipe must not block.
    descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadError("warmup_samples is not a regular file")
    return os.fdopen(descriptor, "rb")


def _as_input(spec: TensorSpec, array: object) -> np.ndarray[Any, Any]:
    """A member of a file as the session takes it. LoadError: it is no array of the input's datatype."""
    if not isinstance(array, np.ndarray):  # NumPy gives the bytes of what is none
        raise LoadError(f"warmup_samples: {show_name(spec.name)} is no array")
    if spec.datatype.numpy is None and array.dtype.kind in "SU":
        try:
            texts = [v if isinstance(v, bytes) else v.encode() for v in array.reshape(-1).tolist()]
        except (ValueError, SystemError) as error:  # half a surrogate pair; no code point at all
            raise LoadError(
                f"warmup_samples: {show_name(spec.name)} holds what is no text", str(error)
            ) from None
        return strings.as_array(texts, array.shape)
    if spec.datatype.numpy is None or array.dtype != spec.datatype.dtype:
        raise LoadError(
            f"warmup_samples: {show_name(spec.name)} is {array.dtype}, expected {spec.datatype.name}"
        )
    return np.ascontiguousarray(array).reshape(array.shape)
