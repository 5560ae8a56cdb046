"""Made-up inputs for a model of which nothing is known but its signature.

The loader needs a run or two to see how a model behaves. Whether made-up values make sense to it cannot
be known; so several are tried, and what no run could show is not taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.serving import strings
from gateway.serving.geometry import inner_of
from gateway.tensors import Signature, TensorSpec, element_count

SEED = 20
"""Of the random values: a load is repeatable."""

DIM_CHOICES = (4, 1, 8, 16, 32, 3, 64, 224)
"""What a dim that varies is tried with; the last ones are for stacks of convolutions."""

UNKNOWN_RANK_SHAPES = ((4,), (4, 4), ())
"""What an input of unknown rank is tried with."""

MAX_SAMPLE_ELEMENTS = 1 << 24
"""Elements of one made-up tensor: larger dims are not tried."""

Array = npt.NDArray[np.generic]
Arrays = dict[str, Array]

KINDS = ("random", "ones", "zeros")


@dataclass(frozen=True, slots=True)
class Sample:
    """Dims and a kind of values, of which arrays of any number of rows can be made.

    Attributes:
        inputs: those that are sent: optional ones are not.
        dims: dims of a row of each.
        kind: one of `KINDS`.
        has_rows: whether tensors have a batch dim.
    """

    inputs: tuple[TensorSpec, ...]
    dims: tuple[tuple[int, ...], ...]
    kind: str
    has_rows: bool

    def arrays(self, rows: int) -> Arrays:
        """Arrays by input name; the same first rows whatever their number."""
        made = {}
        for spec, inner in zip(self.inputs, self.dims, strict=True):
            rng = np.random.default_rng(SEED)
            dims = (rows, *inner) if self.has_rows else inner
            made[spec.name] = _values(rng, spec, dims, self.kind)
        return made


def candidates(signature: Signature) -> Iterator[Sample]:
    """Samples to try, the likeliest first."""
    inputs = tuple(spec for spec in signature.inputs if not spec.optional)
    tried = set()
    for choice, size in enumerate(DIM_CHOICES):
        unranked = UNKNOWN_RANK_SHAPES[choice % len(UNKNOWN_RANK_SHAPES)]
        dims = tuple(_dims(signature, spec, size, unranked) for spec in inputs)
        if dims in tried or any(element_count(d) > MAX_SAMPLE_ELEMENTS for d in dims):
            continue
        tried.add(dims)
        for kind in KINDS:
            yield Sample(inputs, dims, kind, signature.is_batched)


def _dims(
    signature: Signature, spec: TensorSpec, size: int, unranked: tuple[int, ...]
) -> tuple[int, ...]:
    if spec.shape is None:
        return unranked
    buckets = {padding.dim: padding.buckets[0] for padding in signature.padding}
    return tuple(
        dim if isinstance(dim, int) else buckets.get(dim, size) if dim is not None else size
        for dim in inner_of(signature, spec)
    )


def _values(rng: np.random.Generator, spec: TensorSpec, dims: Sequence[int], kind: str) -> Array:
    """Values that most models accept: small, and 0 or 1 where they are whole numbers."""
    dims = tuple(dims)
    if spec.datatype.numpy is None:
        texts = {"random": (b"a", b"b c", b"1 2 3", b""), "ones": (b"1",), "zeros": (b"0",)}[kind]
        picked = rng.integers(0, len(texts), element_count(dims))
        return strings.as_array((texts[i] for i in picked), dims)
    dtype = spec.datatype.dtype
    if spec.datatype.name == "BF16":
        numbers = _numbers(rng, dims, kind, is_float=True).astype(np.float32)
        return np.asarray(numbers.view(np.uint32) >> 16, np.uint16)
    return _numbers(rng, dims, kind, is_float=dtype.kind == "f").astype(dtype)


def _numbers(
    rng: np.random.Generator, dims: tuple[int, ...], kind: str, *, is_float: bool
) -> Array:
    if kind != "random":
        return np.full(dims, int(kind == "ones"))
    return rng.standard_normal(dims) if is_float else rng.integers(0, 2, dims)
