"""Whether a model's outputs may be bound to shared memory, seen by binding them to memory of known content.

ONNX Runtime does not write an output that is also an input or a constant where it was bound, and what a
graph declares of its outputs' dims may be wrong. Either would leave a slot's former content in an answer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gateway.protocols.call import show_name
from gateway.serving import batching, geometry
from gateway.serving.onnxfile import ModelFacts
from gateway.serving.samples import Sample, candidates
from gateway.serving.session import ModelSession, RunError
from gateway.serving.staging import aligned
from gateway.tensors import Signature

CANARIES = (0xA5, 0x5A)
"""Two patterns: a byte that holds both, one after the other, was not written by the run."""

OTHER_DIMS = 2
"""Further sets of dims that are tried, a smaller and a larger one."""

_BRANCHING = frozenset({"If", "Loop", "Scan"})


def why_not(
    session: ModelSession, signature: Signature, facts: ModelFacts, sample: Sample | None
) -> str | None:
    """Why outputs are not bound to shared memory; None if they are, where their size is known."""
    texts = [s.name for s in (*signature.inputs, *signature.outputs) if s.datatype.numpy is None]
    if texts:
        return f"{show_name(texts[0])} holds strings"
    if facts.ops & _BRANCHING:
        return "its control flow may give other outputs at other inputs"
    if sample is None:
        return "no made-up input ran, so it was not seen where outputs are written"
    for tried in (sample, *_other_dims(session, signature, sample)):
        problem = _not_written(session, signature, tried)
        if problem is not None:
            return problem
    return None


def in_words(signature: Signature, copied_because: str | None) -> str:
    """How outputs travel, given what `why_not` said."""
    unknown = geometry.unknown_output(signature)
    if copied_because is None and unknown is not None:
        copied_because = f"the size of {show_name(unknown)} is only known then"
    if copied_because is None:
        return "written in place by ONNX Runtime"
    return f"copied after each run: {copied_because}"


def _other_dims(session: ModelSession, signature: Signature, sample: Sample) -> Iterator[Sample]:
    """Samples of other dims, where dims vary: declared dims may hold by chance for the first."""
    found = 0
    for other in candidates(signature):
        if found == OTHER_DIMS:
            return
        if other.dims == sample.dims or other.kind != sample.kind:
            continue
        try:
            session.run_arrays(other.arrays(batching.ROWS))
        except RunError:
            continue
        found += 1
        yield other


def _not_written(session: ModelSession, signature: Signature, sample: Sample) -> str | None:
    """Bind the outputs to memory of known content; what is wrong with what the run leaves there."""
    arrays = sample.arrays(batching.ROWS)
    rows = batching.ROWS if signature.is_batched else 1
    dims = tuple(
        (arrays[spec.name].shape[1:] if signature.is_batched else arrays[spec.name].shape)
        if spec.name in arrays
        else None
        for spec in signature.inputs
    )
    shape = geometry.shape_of(signature, dims, rows)
    if shape.outputs is None:
        return None  # they are not bound
    inputs, outputs = aligned(shape.input_bytes), aligned(shape.output_bytes)
    for p in shape.inputs:
        raw = np.ascontiguousarray(arrays[p.spec.name]).reshape(-1).view(np.uint8)
        inputs[p.offset : p.offset + raw.size] = raw
    untouched = np.ones(shape.output_bytes, bool)
    for canary in CANARIES:
        outputs[:] = canary
        binding = session.bind(shape, rows, inputs.ctypes.data, outputs.ctypes.data)
        try:
            session.run(binding)
        except RunError:
            return "the graph declares shapes that its outputs do not have"
        untouched &= outputs == canary
    for p in shape.outputs:
        begin, end = p.span(0, rows if p.has_rows else 1)
        if untouched[begin:end].any():
            return f"output {show_name(p.spec.name)} is not written where it is bound"
    return None
