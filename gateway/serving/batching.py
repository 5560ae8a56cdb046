"""Whether a model's requests may share a batch, and the run-time tests of that.

A first dim that varies by name looks like a batch in many graphs that mix rows: a sequence, a mean over
the first dim, a quantisation whose scale is taken from the whole batch. Requests of different clients
must not share a run then. So a graph must look like it, and rows must answer the same alone, together,
and beside rows of quite another size.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.errors import LoadError
from gateway.protocols.call import show_name
from gateway.serving import geometry
from gateway.serving.plan import LoadPlan
from gateway.serving.samples import Arrays, Sample, candidates
from gateway.serving.session import ModelSession, RunError
from gateway.tensors import Signature, TensorSpec

DEFAULT_MAX_BATCH_SIZE = 64
"""Rows a batch where the graph allows batching and no setting says otherwise."""

ROWS = 3
"""Of the tests: a first, a middle and a last one."""

LOUD = 64
"""How much larger the mates' values are in the last test: a scale taken from the batch shows."""

LOUD_NUMBERS = (3, 20, 1000)
"""Up to what the mates' whole numbers go there: a length or an index taken from the batch shows. The
larger ones may be outside of what the model takes."""

_TOLERANCES = {"FP16": 5e-3, "BF16": 4e-2}
"""Of an answer's largest value, by datatype; kernels round differently at other batch sizes."""

_TOLERANCE = 1e-4

_NOT_EXACT = frozenset(
    {
        "DynamicQuantizeLinear",
        "com.microsoft::DynamicQuantizeMatMul",
        "com.microsoft::DynamicQuantizeLSTM",
    }
)
"""Operators that make rows depend on each other by so little that no tolerance is allowed."""

_SIZED_BY_VALUES = frozenset({"Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"})
"""Operators whose output has room for what the row with the most of it needs."""

_WHOLE = "one request at a time"

_EFFECT = (
    "its rows' answers change with the other rows of a batch "
    "(accept_batch_effects would batch them all the same)"
)


def declared(session: ModelSession, plan: LoadPlan) -> tuple[Signature, str]:
    """What settings and graph say, and why; the tests may say otherwise.

    Raises:
        LoadError: the settings ask for what the graph cannot do.
    """
    whole = Signature(session.inputs, session.outputs, 0, (), plan.padding)
    asked = plan.asked_batch_size
    if asked == 0:
        return whole, f"{_WHOLE}: max_batch_size is 0"
    required = [spec for spec in session.inputs if not spec.optional]
    reason = _no_batch(required, session.outputs, is_asked=asked is not None)
    if reason is not None:
        return whole, f"{_WHOLE}: {reason}"
    size = asked or DEFAULT_MAX_BATCH_SIZE
    batched = replace(whole, max_batch_size=size, allowed_batch_sizes=plan.allowed_batch_sizes)
    why = (
        "its settings say so"
        if asked is not None
        else f"inputs and outputs share the symbolic first dim {show_name((required[0].shape or ('?',))[0])}"
    )
    return batched, f"batches of up to {size} rows: {why}"


def _no_batch(
    inputs: list[TensorSpec], outputs: tuple[TensorSpec, ...], *, is_asked: bool
) -> str | None:
    """Why the graph has no batch dim; None if it may have one. LoadError: settings insist on one."""
    if not inputs:
        return "no input is required"
    firsts = {spec.name: (spec.shape or (0,))[0] for spec in (*inputs, *outputs)}
    for spec in inputs:
        if isinstance(firsts[spec.name], int) and is_asked:
            raise LoadError(
                f"max_batch_size is set, but the first dim of input {show_name(spec.name)} is not variable: "
                f"its shape is {list(spec.shape or ())}"
            )
    for spec in (*inputs, *outputs):
        if isinstance(firsts[spec.name], int):
            return f"the first dim of {show_name(spec.name)} is not variable"
    names = set(firsts.values())
    if not is_asked and (len(names) > 1 or None in names):
        return "the first dims of inputs and outputs are not one symbolic dim"
    for spec in (*inputs, *outputs):
        batch = firsts[spec.name]
        if isinstance(batch, str) and batch in (spec.shape or ())[1:]:
            return f"{show_name(spec.name)} has the batch dim {show_name(batch)} inside, too"
    return None


def tested(
    session: ModelSession, signature: Signature, plan: LoadPlan, ops: frozenset[str]
) -> tuple[Signature, str | None, Sample | None]:
    """Try whether rows are independent, where they are to be batched.

    Returns:
        The signature, whole if they are not; why, None where the declaration stands; and a sample
        that the model takes, None where no sample did.
    """
    sample = find_sample(session, signature, is_bounded=plan.memory_bytes is not None)
    if not signature.is_batched:
        return signature, None, sample
    unknown = geometry.unknown_output(signature)
    if unknown is not None and ops & _SIZED_BY_VALUES:
        reason = f"the size of {show_name(unknown)} depends on the values of all rows"
    elif sample is None:
        if plan.asked_batch_size is not None:
            return signature, None, None
        reason = "no made-up input ran, so it is not known whether rows are independent"
    else:
        found = _dependence(
            session,
            sample,
            is_exact=bool(ops & _NOT_EXACT),
            must_show=unknown is not None and _has_discrete(signature),
        )
        if found is None or (plan.accept_batch_effects and found == _EFFECT):
            return signature, None, sample
        reason = found
    whole = replace(signature, max_batch_size=0, allowed_batch_sizes=())
    if sample is not None:
        dims = tuple((ROWS, *inner) for inner in sample.dims)
        sample = replace(sample, dims=dims, has_rows=False)
    return whole, f"{_WHOLE}: {reason}", sample


def find_sample(
    session: ModelSession, signature: Signature, *, is_bounded: bool = False
) -> Sample | None:
    """The first made-up input on which the model runs.

    Args:
        session: the model's.
        signature: as declared.
        is_bounded: this process may only have so much memory.

    Raises:
        LoadError: it is bounded, and the model wants more.
    """
    for sample in candidates(signature):
        try:
            session.run_arrays(sample.arrays(ROWS))
        except RunError as error:
            if is_bounded and lacks_memory(str(error)):
                raise LoadError(error.public, str(error)) from None
            continue
        return sample
    return None


def lacks_memory(text: str) -> bool:
    """Whether what ONNX Runtime says is that it got no memory."""
    return "bad_alloc" in text or "allocat" in text


def _has_discrete(signature: Signature) -> bool:
    """Whether an input holds what sizes are made of: whole numbers, or strings."""
    return any(
        spec.datatype.numpy is None or spec.datatype.dtype.kind in "iub"
        for spec in signature.inputs
        if spec.datatype.name != "BF16"
    )


def _dependence(
    session: ModelSession, sample: Sample, *, is_exact: bool, must_show: bool
) -> str | None:
    """How rows depend on each other, None if they do not as far as these runs show.

    Args:
        session: the model's.
        sample: on which it runs.
        is_exact: not even the last bit may change.
        must_show: it counts as dependence that no run beside loud rows succeeded.
    """
    arrays = sample.arrays(ROWS)
    try:
        together = session.run_arrays(arrays)
        alone = [
            session.run_arrays({name: a[i : i + 1].copy() for name, a in arrays.items()})
            for i in range(ROWS)
        ]
    except RunError:
        return "it does not run on each number of rows"
    for spec, output, *rows in zip(session.outputs, together, *alone, strict=True):
        if output.ndim == 0 or len(output) != ROWS or any(len(row) != 1 for row in rows):
            return f"output {show_name(spec.name)} does not have a row for each row of the inputs"
        for i, row in enumerate(rows):
            if not _same(spec, output[i : i + 1], row, is_exact=is_exact):
                return _EFFECT
    has_shown = False
    for quiet, loud in itertools.product((0, ROWS - 1), LOUD_NUMBERS):
        try:
            mixed = session.run_arrays(_beside_loud(sample, arrays, quiet, loud))
        except RunError:
            continue  # the loud values are outside of the model's domain
        has_shown = True
        for spec, output, row in zip(session.outputs, mixed, alone[quiet], strict=True):
            if not _same(spec, output[quiet : quiet + 1], row, is_exact=is_exact):
                return _EFFECT
    if must_show and not has_shown:
        return "the size of an output may depend on the values of all rows: no run could show it"
    return None


def _beside_loud(sample: Sample, arrays: Arrays, quiet: int, loud: int) -> Arrays:
    """One row as it was among others of large values: floats many times, whole numbers up to `loud`."""
    rng = np.random.default_rng(loud)
    changed = {}
    for spec in sample.inputs:
        array = arrays[spec.name].copy()
        kept = array[quiet : quiet + 1].copy()
        if spec.datatype.numpy is None:
            array[:] = b"1 2 3 4 " * loud
        elif array.dtype.kind == "f":
            array = array * np.asarray(LOUD, array.dtype)
        elif array.dtype.kind in "iu" and spec.datatype.name != "BF16":
            high = min(loud, np.iinfo(spec.datatype.dtype).max)
            array = rng.integers(high // 2, high + 1, array.shape).astype(array.dtype)
        array[quiet : quiet + 1] = kept
        changed[spec.name] = array
    return changed


def _same(spec: TensorSpec, a: npt.NDArray[Any], b: npt.NDArray[Any], *, is_exact: bool) -> bool:
    if a.shape != b.shape:
        return False
    name = spec.datatype.name
    if name == "BF16":
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    if a.dtype.kind != "f" or is_exact:
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    finite = np.abs(b[np.isfinite(b)].astype(np.float64))
    scale = float(finite.max()) if finite.size else 0.0
    tolerance = _TOLERANCES.get(name, _TOLERANCE)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return np.allclose(wide_a, wide_b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
