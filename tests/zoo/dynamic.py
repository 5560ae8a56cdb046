"""Graphs whose run depends on data: output sizes, branches, loops; and those that mix rows."""

from __future__ import annotations

import numpy as np

from tests.zoo.building import Arrays, Graph, integers, normal, writer


def graphs() -> list[Graph]:
    """All of this module."""
    return [
        *_sized_by_data(),
        *_shaped_by_inputs(),
        *_control_flow(),
        *_mixing_rows(),
    ]


def _sized_by_data() -> list[Graph]:
    few = ("(int64[n] x) => (int64[k] y, int64[k] first, int64[n] back, int64[k] counts) "
           "{ y, first, back, counts = Unique (x) }")  # fmt: skip
    boxes = (
        "(float[1, boxes, 4] boxes_in, float[1, 1, boxes] scores) => (int64[chosen, 3] y) "
        "<int64 most = {5}, float overlap = {0.5}, float least = {0.1}> "
        "{ y = NonMaxSuppression (boxes_in, scores, most, overlap, least) }"
    )

    def some_boxes(rng: np.random.Generator, n: int) -> Arrays:
        corner, size = rng.random((1, n, 2)), rng.random((1, n, 2)) / 2
        both = np.concatenate([corner, corner + size], 2).astype(np.float32)
        return {"boxes_in": both, "scores": rng.random((1, 1, n)).astype(np.float32)}

    return [
        Graph(
            "non_zero",
            writer("(int64[n, 3] x) => (int64[2, k] at) { at = NonZero (x) }"),
            lambda rng, n: {"x": integers(rng, 0, 2, n, 3)},
            batched=False,
        ),
        Graph("unique", writer(few), lambda rng, n: {"x": integers(rng, 0, 6, n)}, batched=False),
        Graph(
            "compress",
            writer(
                "(float[n, 2] x, bool[n] keep) => (float[k, 2] y) { y = Compress <axis = 0> (x, keep) }"
            ),
            lambda rng, n: {"x": normal(rng, n, 2), "keep": integers(rng, 0, 2, n, dtype=np.bool_)},
            batched=False,
        ),
        Graph(
            "where_then_non_zero",
            writer(
                "(float[n, 3] x) => (float[n, 3] kept, int64[2, k] at) <float zero = {0}> "
                "{ positive = Greater (x, zero)  kept = Where (positive, x, zero)  at = NonZero (kept) }"
            ),
            lambda rng, n: {"x": normal(rng, n, 3)},
            batched=False,
        ),
        Graph(
            "positions_for_each_row",
            writer(
                "(float[n, 3] x) => (int64[n, 2] at) { turned = NonZero (x)  at = Transpose (turned) }"
            ),
            lambda rng, n: {"x": integers(rng, 0, 2, n, 3, dtype=np.float32)},
            batched=False,
        ),
        Graph(
            "range",
            writer(
                "(int64 start, int64 end, int64 step) => (int64[k] y) { y = Range (start, end, step) }"
            ),
            lambda rng, n: {
                "start": integers(rng, -3, 3),
                "end": np.array(n, np.int64),
                "step": integers(rng, 1, 3),
            },
            batched=False,
        ),
        Graph("boxes", writer(boxes), some_boxes, batched=False),
    ]


def _shaped_by_inputs() -> list[Graph]:
    """A shape, a bound or a count comes as a tensor."""
    return [
        Graph(
            "top_k_of_input",
            writer(
                "(float[m] x, int64[1] k) => (float[k] best, int64[k] at) { best, at = TopK (x, k) }"
            ),
            lambda rng, n: {"x": normal(rng, n), "k": integers(rng, 0, n + 1, 1)},
            batched=False,
        ),
        Graph(
            "reshape",
            writer("(float[a, b] x, int64[r] shape) => (float[] y) { y = Reshape (x, shape) }"),
            lambda rng, n: {
                "x": normal(rng, n, 4),
                "shape": np.array([(n * 4,), (4, n), (2, -1, 2), (1, 1, 2, 2, n)][n % 4], np.int64),
            },
            batched=False,
        ),
        Graph(
            "slice",
            writer(
                "(int32[m, 5] x, int64[2] from, int64[2] to) => (int32[p, q] y) { y = Slice (x, from, to) }"
            ),
            lambda rng, n: {
                "x": integers(rng, -9, 9, n, 5, dtype=np.int32),
                "from": integers(rng, 0, 3, 2),
                "to": integers(rng, 1, 9, 2),
            },
            batched=False,
        ),
        Graph(
            "tile",
            writer("(uint8[a, b] x, int64[2] times) => (uint8[c, d] y) { y = Tile (x, times) }"),
            lambda rng, n: {
                "x": integers(rng, 0, 256, n, 2, dtype=np.uint8),
                "times": integers(rng, 0, 4, 2),
            },
            batched=False,
        ),
        Graph(
            "expand",
            writer(
                "(double[a, 1] x, int64[3] shape) => (double[c, a, d] y) { y = Expand (x, shape) }"
            ),
            lambda rng, n: {
                "x": normal(rng, n, 1, dtype=np.float64),
                "shape": np.array([1 + n % 3, n, 2], np.int64),
            },
            batched=False,
        ),
        Graph(
            "filled",
            writer(
                "(int64[r] shape) => (int64[] y) { y = ConstantOfShape <value = int64[1] {7}> (shape) }"
            ),
            lambda rng, n: {"shape": integers(rng, 0, 4, n % 5)},
            batched=False,
        ),
        Graph(
            "large_output",
            writer(
                "(int64[2] shape) => (uint8[p, q] y) { y = ConstantOfShape <value = uint8[1] {7}> (shape) }"
            ),
            lambda rng, n: {"shape": np.array([n, 40_000], np.int64)},
            batched=False,
        ),
        Graph(
            "large_output_of_rows",
            writer(
                "(uint8[n, 2] x, float[n, 1] much) => (uint8[n, k] y) "
                "<int64[1] one = {1}, int64[1] times = {10000}> "
                "{ none = Sub (much, much)  sum = ReduceSum <keepdims = 0> (none)  "
                "zero = Cast <to = 7> (sum)  k1 = Add (times, zero)  "
                "repeats = Concat <axis = 0> (one, k1)  y = Tile (x, repeats) }"
            ),
            lambda rng, n: {
                "x": integers(rng, 0, 256, n, 2, dtype=np.uint8),
                "much": normal(rng, n, 1),
            },
            batched=True,
        ),
        Graph(
            "shape_and_size",
            writer(
                "(float[a, b, c] x) => (int64[3] shape, int64 size) { shape = Shape (x)  size = Size (x) }"
            ),
            lambda rng, n: {"x": normal(rng, n, n % 3, 2)},
            batched=False,
        ),
    ]


def _control_flow() -> list[Graph]:
    branches = (
        "(bool twice, float[m] x) => (float[k] y) { y = If (twice) <"
        "then_branch = longer () => (float[p] a) { a = Concat <axis = 0> (x, x) }, "
        "else_branch = same () => (float[q] b) { b = Neg (x) }> }"
    )
    ranks = (
        "(bool flat, float[a, b] x) => (float[] y) { y = If (flat) <"
        "then_branch = line () => (float[p] c) { minus = Constant <value = int64[1] {-1}> ()  "
        "c = Reshape (x, minus) }, else_branch = table () => (float[a, b] d) { d = Identity (x) }> }"
    )
    counted = (
        "(int64 steps, float[3] x) => (float[3] last, float[k, 3] every) "
        "<bool true = {1}> { last, every = Loop (steps, true, x) <"
        "body = step (int64 i, bool on, float[3] had) => (bool more, float[3] now, float[3] seen) "
        "{ more = Identity (on)  real = Cast <to = 1> (i)  now = Add (had, real)  seen = Neg (now) }> }"
    )
    until = (
        "(int64 x) => (int64 y) <int64 most = {100}, bool true = {1}, int64 two = {2}, int64 limit = {50}> "
        "{ y = Loop (most, true, x) <"
        "body = step (int64 i, bool on, int64 had) => (bool more, int64 now) "
        "{ now = Mul (had, two)  more = Less (now, limit) }> }"
    )
    in_rows = (
        "(float[n, 3] x) => (float[n, 3] y) <int64 three = {3}, bool true = {1}> "
        "{ y = Loop (three, true, x) <"
        "body = step (int64 i, bool on, float[n, 3] had) => (bool more, float[n, 3] now) "
        "{ more = Identity (on)  now = Add (had, x) }> }"
    )
    scan = (
        "(float[steps, 2] x, float[2] start) => (float[2] last, float[steps, 2] sums) "
        "{ last, sums = Scan (start, x) <num_scan_inputs = 1, "
        "body = step (float[2] had, float[2] one) => (float[2] now, float[2] seen) "
        "{ now = Add (had, one)  seen = Identity (now) }> }"
    )
    scan_rows = (
        "(float[n, 2] x) => (float[n, 2] sums) <float[2] start = {0, 0}> "
        "{ last, sums = Scan (start, x) <num_scan_inputs = 1, "
        "body = step (float[2] had, float[2] one) => (float[2] now, float[2] seen) "
        "{ now = Add (had, one)  seen = Identity (now) }> }"
    )
    return [
        Graph(
            "if_of_two_lengths",
            writer(branches),
            lambda rng, n: {"twice": integers(rng, 0, 2, dtype=np.bool_), "x": normal(rng, n)},
            batched=False,
        ),
        Graph(
            "if_of_two_ranks",
            writer(ranks),
            lambda rng, n: {"flat": integers(rng, 0, 2, dtype=np.bool_), "x": normal(rng, n, 2)},
            batched=False,
        ),
        Graph(
            "loop_counted",
            writer(counted),
            lambda rng, n: {"steps": np.array(n % 7, np.int64), "x": normal(rng, 3)},
            batched=False,
        ),
        Graph(
            "loop_until", writer(until), lambda rng, n: {"x": integers(rng, 1, 60)}, batched=False
        ),
        Graph(
            "loop_over_rows", writer(in_rows), lambda rng, n: {"x": normal(rng, n, 3)}, batched=True
        ),
        Graph(
            "scan",
            writer(scan),
            lambda rng, n: {"x": normal(rng, n, 2), "start": normal(rng, 2)},
            batched=False,
        ),
        Graph(
            "scan_over_rows",
            writer(scan_rows),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=False,
        ),
    ]


def _mixing_rows() -> list[Graph]:
    """The first dims are one symbolic dim, but a row's answer depends on the others."""
    shape = "(float[n, 3] x) => (float[n, 3] y)"
    first = "<int64[1] zero = {0}>"
    bodies = {
        "softmax": f"{shape} {{ y = Softmax <axis = 0> (x) }}",
        "centred": f"{shape} {first} {{ mean = ReduceMean (x, zero)  y = Sub (x, mean) }}",
        "running_sum": f"{shape} <int64 zero = {{0}}> {{ y = CumSum (x, zero) }}",
        "reversed": (
            f"{shape} <int64[1] zero = {{0}}, int64[1] from = {{-1}}, int64[1] to = {{-1000000}}> "
            "{ y = Slice (x, from, to, zero, from) }"
        ),
        "largest": f"{shape} {first} {{ most = ReduceMax (x, zero)  y = Div (x, most) }}",
        "sorted": (
            f"{shape} <int64[1] first = {{0}}, int64[1] second = {{1}}> {{ shape = Shape (x)  "
            "count = Slice (shape, first, second)  y, at = TopK <axis = 0> (x, count) }"
        ),
        "counted": (
            "(float[n, 3] x) => (int64[n] y) <int64[1] first = {0}, int64[1] second = {1}> "
            "{ shape = Shape (x)  count = Slice (shape, first, second)  y = Expand (count, count) }"
        ),
        "products": "(float[n, 3] x) => (float[n, n] y) { turned = Transpose (x)  y = MatMul (x, turned) }",
    }  # fmt: skip
    return [
        Graph(
            f"mixing_{name}",
            writer(text),
            lambda rng, n: {"x": normal(rng, n, 3)},
            batched=False,
            exact=name not in {"softmax", "products"},
        )
        for name, text in bodies.items()
    ]
