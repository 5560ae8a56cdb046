"""Graphs that are about their tensors: datatypes, ranks, fixed, symbolic, unknown and zero dims."""

from __future__ import annotations

import numpy as np

from tests.zoo.building import (
    NUMPY,
    Arrays,
    Graph,
    anything,
    integers,
    normal,
    writer,
)

MAX_RANK = 8

_RANK_TYPES = ("float", "int64", "double", "int32", "float", "int64", "float", "double", "int32")
"""Of the graphs of rank 0 to 8."""


def graphs() -> list[Graph]:
    """All of this module."""
    return [
        *(_datatype(text_type) for text_type in NUMPY),
        *(_fixed_rank(rank) for rank in range(MAX_RANK + 1)),
        *(_rows_of_rank(rank) for rank in range(1, MAX_RANK + 1)),
        *_first_dims(),
        *_several_tensors(),
        *_unknown(),
        *_zero_elements(),
    ]


def _datatype(text_type: str) -> Graph:
    """Each value of the type, kept bit for bit: every row beside a copy of itself."""
    text = f"({text_type}[n, 3] x) => ({text_type}[n, 6] y) {{ y = Concat <axis = 1> (x, x) }}"
    return Graph(
        f"twice_{text_type}",
        writer(text),
        lambda rng, n: {"x": anything(rng, text_type, n, 3)},
        batched=True,
    )


def _fixed_rank(rank: int) -> Graph:
    """All dims fixed, the first one 1 where there is one; transposed, so that order is seen."""
    text_type = _RANK_TYPES[rank]
    dims = [1, *(2 + axis % 2 for axis in range(1, rank))][:rank]
    shape = f"[{', '.join(map(str, dims))}]" if rank else ""
    back = f"[{', '.join(map(str, reversed(dims)))}]" if rank else ""
    text = (
        f"({text_type}{shape} x) => ({text_type}{back} y) "
        f"{{ turned = Transpose (x)  y = Neg (turned) }}"
    )
    return Graph(
        f"fixed_rank_{rank}",
        writer(text),
        lambda rng, n: {"x": integers(rng, -9, 9, *dims, dtype=NUMPY[text_type])},
        batched=False,
    )


def _rows_of_rank(rank: int) -> Graph:
    """A symbolic first dim, the others fixed: a batch."""
    text_type = _RANK_TYPES[rank]
    inner = [1 + axis % 2 for axis in range(1, rank)]
    shape = f"[{', '.join(['n', *map(str, inner)])}]"
    return Graph(
        f"rows_rank_{rank}",
        writer(f"({text_type}{shape} x) => ({text_type}{shape} y) {{ y = Neg (x) }}"),
        lambda rng, n: {"x": integers(rng, -9, 9, n, *inner, dtype=NUMPY[text_type])},
        batched=True,
    )


def _first_dims() -> list[Graph]:
    """Where the first dims are not one symbolic dim, there is no batch."""
    return [
        Graph(
            "no_batch_dim",
            writer("(float[3] x) => (float[3] y) { y = Mul (x, x) }"),
            lambda rng, n: {"x": normal(rng, 3)},
            batched=False,
        ),
        Graph(
            "two_first_dims",
            writer(
                "(float[n, 2] a, float[m, 2] b) => (float[n, m] products) "
                "{ turned = Transpose (b)  products = MatMul (a, turned) }"
            ),
            lambda rng, n: {"a": normal(rng, n, 2), "b": normal(rng, 1 + n % 5, 2)},
            batched=False,
            exact=False,
        ),
        Graph(
            "unnamed_first_dims",
            writer("(float[?, 2] x) => (float[?, 2] y) { y = Abs (x) }"),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=False,
        ),
        Graph(
            "fixed_input_beside_rows",
            writer("(float[n, 2] x, float[2] scale) => (float[n, 2] y) { y = Mul (x, scale) }"),
            lambda rng, n: {"x": normal(rng, n, 2), "scale": normal(rng, 2)},
            batched=False,
        ),
        Graph(
            "scalar_input_beside_rows",
            writer("(float[n, 2] x, float scale) => (float[n, 2] y) { y = Mul (x, scale) }"),
            lambda rng, n: {"x": normal(rng, n, 2), "scale": normal(rng)},
            batched=False,
        ),
        Graph(
            "told_one_at_a_time",
            writer("(float[n, 2] x) => (float[n, 2] y) { y = Neg (x) }"),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=False,
            config="max_batch_size: 0\n",
        ),
        Graph(
            "told_sizes",
            writer("(float[n, 2] x) => (float[n, 2] y) { y = Neg (x) }"),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=True,
            config="allowed_batch_sizes: [1, 4, 16, 64]\n",
        ),
        Graph(
            "told_padding",
            writer("(float[n, length] x) => (float[n, length] y) { y = Neg (x) }"),
            lambda rng, n: {"x": normal(rng, n, int(rng.integers(1, 12)))},
            batched=True,
            config="padding: {length: {buckets: [4, 8]}}\n",
        ),
    ]


def _several_tensors() -> list[Graph]:
    count = 100
    names = [f"x{i}" for i in range(count)]
    inputs = ", ".join(f"float[n, 1] {name}" for name in names)
    outputs = ", ".join(f"float[n, 1] y{i}" for i in range(20))
    split = ", ".join(f"y{i}" for i in range(20))
    mixed = (
        "(bool[n] keep, uint8[n, 2] small, int64[n] large, double[n, 2] real) "
        "=> (double[n, 2] chosen, int64[n] sum, bool[n] dropped, uint8[n, 2] clipped) "
        "<int64[1] one = {1}, uint8 least = {9}> { column = Unsqueeze (keep, one) "
        "wide = Cast <to = 11> (small)  chosen = Where (column, wide, real) "
        "sum = Add (large, large)  dropped = Not (keep)  clipped = Max (small, least) }"
    )
    return [
        Graph(
            "hundred_inputs",
            writer(
                f"({inputs}) => (float[n, {count}] y) {{ y = Concat <axis = 1> ({', '.join(names)}) }}"
            ),
            lambda rng, n: {name: normal(rng, n, 1) for name in names},
            batched=True,
        ),
        Graph(
            "twenty_outputs",
            writer(
                f"(float[n, 20] x) => ({outputs}) {{ {split} = Split <axis=1, num_outputs=20> (x) }}"
            ),
            lambda rng, n: {"x": normal(rng, n, 20)},
            batched=True,
        ),
        Graph(
            "mixed_datatypes",
            writer(mixed),
            lambda rng, n: {
                "keep": anything(rng, "bool", n),
                "small": anything(rng, "uint8", n, 2),
                "large": integers(rng, -(2**40), 2**40, n),
                "real": anything(rng, "double", n, 2),
            },
            batched=True,
        ),
        Graph(
            "row_and_global_outputs",
            writer(
                "(float[n, 3] x) => (float[n, 3] y, float total) "
                "{ y = Neg (x)  total = ReduceSum <keepdims = 0> (x) }"
            ),
            lambda rng, n: {"x": normal(rng, n, 3)},
            batched=False,
        ),
    ]


def _unknown() -> list[Graph]:
    """Tensors whose rank the file does not say."""
    shapes: tuple[tuple[int, ...], ...] = ((), (3,), (2, 1, 2), (1,) * MAX_RANK)

    def any_rank(rng: np.random.Generator, n: int) -> Arrays:
        return {"x": normal(rng, *shapes[n % len(shapes)])}

    return [
        Graph(
            "unknown_rank",
            writer("(float[] x) => (float[] y) { y = Abs (x) }"),
            any_rank,
            batched=False,
        ),
        Graph(
            "unknown_output_rank",  # to the file, not to ONNX Runtime
            writer("(float[n, 2] x) => (float[] y) { y = Abs (x) }"),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=True,
        ),
        Graph(
            "unknown_inner_dims",
            writer(
                "(int32[n, ?, ?] x) => (int32[n, ?] y) { y = ReduceSum <keepdims=0> (x, axis) }",
                axis=np.array([2]),
            ),
            lambda rng, n: {"x": integers(rng, -9, 9, n, *rng.integers(1, 4, 2), dtype=np.int32)},
            batched=True,
        ),
    ]


def _zero_elements() -> list[Graph]:
    return [
        Graph(
            "zero_inner_dim",
            writer(
                "(float[n, d] x) => (float[n, d] y, float[n, 1] sum) "
                "{ y = Neg (x)  sum = ReduceSum (x, axis) }",
                axis=np.array([1]),
            ),
            lambda rng, n: {"x": integers(rng, -9, 9, n, n % 3, dtype=np.float32)},
            batched=True,
        ),
        Graph(
            "zero_first_dim",
            writer(
                "(int64[n, 2] a, int64[m, 2] b) => (int64[k, 2] y) { y = Concat <axis = 0> (a, b) }"
            ),
            lambda rng, n: {"a": integers(rng, 0, 9, n - 1, 2), "b": integers(rng, 0, 9, n % 2, 2)},
            batched=False,
        ),
        Graph(
            "zero_element_constant",
            writer(
                "(float[n, 3] x) => (float[k, 3] y, float[0] none) "
                "{ y = Concat <axis = 0> (x, empty)  none = Identity (nothing) }",
                empty=np.zeros((0, 3), np.float32),
                nothing=np.zeros(0, np.float32),
            ),
            lambda rng, n: {"x": normal(rng, n, 3)},
            batched=False,
        ),
        Graph(
            "zero_fixed_dim",
            writer(
                "(float[0, 3] x) => (float[3] sum) <int64[1] axis = {0}> "
                "{ sum = ReduceSum <keepdims = 0> (x, axis) }"
            ),
            lambda rng, n: {"x": np.zeros((0, 3), np.float32)},
            batched=False,
        ),
    ]
