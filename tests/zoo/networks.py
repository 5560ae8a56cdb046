"""Graphs as trained models have them: layers, several precisions, integers, attention, recurrence."""

from __future__ import annotations

import numpy as np

from tests.zoo.building import (
    NEWEST_OPSET,
    Arrays,
    Graph,
    Sample,
    anything,
    integers,
    normal,
    weights,
    writer,
)

OLDEST_OPSET = 7
"""The oldest that ONNX Runtime promises to run."""

_HALF_RTOL = 1e-2


def graphs() -> list[Graph]:
    """All of this module."""
    return [
        *(_mlp_of_opset(opset) for opset in range(OLDEST_OPSET, NEWEST_OPSET + 1)),
        *_layers(),
        *_half_precision(),
        *_integer_arithmetic(),
        *_recurrent(),
        *_not_finite(),
        *_selections(),
    ]


def _rows(*inner: int) -> Sample:
    return lambda rng, n: {"x": normal(rng, n, *inner)}


def _mlp_of_opset(opset: int) -> Graph:
    """The same small network, as each set of operators writes it."""
    rng = weights("mlp")
    text = (
        "(float[n, 8] x) => (float[n, 4] y) { a = Gemm (x, w1, b1)  b = Relu (a)  "
        "c = Gemm (b, w2, b2)  y = Softmax <axis = 1> (c) }"
    )
    ir_version = 3 if opset < 9 else 7 if opset < 19 else 10
    # Before IR version 4 an initializer had to be an input as well; ONNX Runtime does not insist.
    return Graph(
        f"mlp_opset_{opset}",
        writer(
            text,
            opset=opset,
            ir_version=max(ir_version, 4),
            w1=normal(rng, 8, 16),
            b1=normal(rng, 16),
            w2=normal(rng, 16, 4),
            b2=normal(rng, 4),
        ),
        _rows(8),
        batched=True,
        exact=False,
    )


def _layers() -> list[Graph]:
    rng = weights("layers")
    conv = (
        "(float[n, 1, 8, 8] x) => (float[n, 3] y) { a = Conv <pads = [1, 1, 1, 1]> (x, kernel, bias)  "
        "b = Relu (a)  c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)  "
        "d = GlobalAveragePool (c)  e = Flatten (d)  y = Gemm (e, dense) }"
    )
    image = "(float[n, 3, h, w] x) => (float[n, 2, h, w] y) { y = Conv <pads = [1, 1, 1, 1]> (x, kernel) }"
    norm = (
        "(float[n, 16] x) => (float[n, 16] y) "
        "{ a = LayerNormalization (x, gain, offset)  y = Gelu (a) }"
    )
    batch_norm = (
        "(float[n, 4, 5] x) => (float[n, 4, 5] y) "
        "{ y = BatchNormalization (x, gain, offset, mean, variance) }"
    )
    return [
        Graph(
            "conv_net",
            writer(
                conv,
                kernel=normal(rng, 4, 1, 3, 3),
                bias=normal(rng, 4),
                dense=normal(rng, 4, 3),
            ),
            _rows(1, 8, 8),
            batched=True,
            exact=False,
        ),
        Graph(
            "conv_any_size",
            writer(image, kernel=normal(rng, 2, 3, 3, 3)),
            lambda rng, n: {"x": normal(rng, n, 3, 3 + n % 3, 4 + n % 2)},
            batched=True,
            exact=False,
        ),
        Graph(
            "layer_norm",
            writer(norm, gain=normal(rng, 16), offset=normal(rng, 16)),
            _rows(16),
            batched=True,
            exact=False,
        ),
        Graph(
            "batch_norm",
            writer(
                batch_norm,
                gain=normal(rng, 4),
                offset=normal(rng, 4),
                mean=normal(rng, 4),
                variance=np.abs(normal(rng, 4)),
            ),
            _rows(4, 5),
            batched=True,
            exact=False,
        ),
        Graph(
            "embedding",
            writer(
                "(int64[n, 3] ids) => (float[n, 3, 4] y) { y = Gather (table, ids) }",
                table=normal(rng, 50, 4),
            ),
            lambda rng, n: {"ids": integers(rng, -50, 50, n, 3)},
            batched=True,
        ),
        _attention(),
    ]


def _attention() -> Graph:
    """One head over a sequence of any length, told by a mask how long each row's is."""
    rng = weights("attention")
    text = (
        "(int64[batch, seq] ids, int64[batch, seq] mask) => (float[batch, seq, 8] y, float[batch, 8] pooled) "
        "<int64[1] one = {1}, float low = {-10000}, float unit = {1}> "
        "{ x = Gather (table, ids)  q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)  "
        "kt = Transpose <perm = [0, 2, 1]> (k)  scores = MatMul (q, kt)  "
        "real = Cast <to = 1> (mask)  absent = Sub (unit, real)  penalty = Mul (absent, low)  "
        "wide = Unsqueeze (penalty, one)  masked = Add (scores, wide)  "
        "share = Softmax <axis = -1> (masked)  y = MatMul (share, v)  "
        "pooled = ReduceMean <keepdims = 0> (y, one) }"
    )

    def sample(rng: np.random.Generator, n: int) -> Arrays:
        length = int(rng.integers(1, 9))
        ids = integers(rng, 0, 30, n, length)
        real = np.arange(length) < integers(rng, 1, length + 1, n, 1)
        return {"ids": ids, "mask": real.astype(np.int64)}

    matrices = {name: normal(rng, 8, 8) for name in ("wq", "wk", "wv")}
    return Graph(
        "attention",
        writer(text, table=normal(rng, 30, 8), **matrices),
        sample,
        batched=True,
        exact=False,
    )


def _half_precision() -> list[Graph]:
    rng = weights("half")
    half = np.float16
    return [
        Graph(
            "fp16_mlp",
            writer(
                "(float16[n, 8] x) => (float16[n, 4] y) "
                "{ a = MatMul (x, w1)  b = Relu (a)  y = MatMul (b, w2) }",
                w1=normal(rng, 8, 8, dtype=half),
                w2=normal(rng, 8, 4, dtype=half),
            ),
            lambda rng, n: {"x": normal(rng, n, 8, dtype=half)},
            batched=True,
            exact=False,
            rtol=_HALF_RTOL,
        ),
        Graph(
            "fp16_to_fp32",
            writer("(float16[n, 4] x) => (float[n, 4] y) { y = Cast <to = 1> (x) }"),
            lambda rng, n: {"x": normal(rng, n, 4, dtype=half)},
            batched=True,
        ),
        Graph(
            "bf16_scaled",
            writer(
                "(bfloat16[n, 4] x, float[n, 1] scale) => (bfloat16[n, 4] y) "
                "{ a = Cast <to = 1> (x)  b = Mul (a, scale)  y = Cast <to = 16> (b) }"
            ),
            lambda rng, n: {"x": anything(rng, "bfloat16", n, 4), "scale": normal(rng, n, 1)},
            batched=True,
        ),
        Graph(
            "bf16_without_batch",
            writer("(bfloat16[2, 3] x) => (bfloat16[3, 2] y) { y = Transpose (x) }"),
            lambda rng, n: {"x": anything(rng, "bfloat16", 2, 3)},
            batched=False,
        ),
        Graph(
            "fp16_scalar",
            writer("(float16 x) => (float16 y) { y = Mul (x, x) }"),
            lambda rng, n: {"x": normal(rng, dtype=half)},
            batched=False,
        ),
    ]


def _integer_arithmetic() -> list[Graph]:
    rng = weights("integers")
    signed = integers(rng, -128, 128, 8, 4, dtype=np.int8)
    qlinear = (
        "(uint8[n, 8] x) => (uint8[n, 4] y) "
        "<float sx = {0.1}, uint8 zx = {128}, float sw = {0.02}, int8 zw = {0}, "
        "float sy = {0.3}, uint8 zy = {100}> "
        "{ y = QLinearMatMul (x, sx, zx, weight, sw, zw, sy, zy) }"
    )
    qdq = (
        "(float[n, 8] x) => (float[n, 8] y) <float scale = {0.05}, int8 zero = {3}> "
        "{ q = QuantizeLinear (x, scale, zero)  y = DequantizeLinear (q, scale, zero) }"
    )
    dynamic = (
        "(float[n, 8] x) => (float[n, 4] y) <float sw = {0.02}> "
        "{ q, scale, zero = DynamicQuantizeLinear (x)  sums = MatMulInteger (q, weight, zero)  "
        "real = Cast <to = 1> (sums)  both = Mul (scale, sw)  y = Mul (real, both) }"
    )
    return [
        Graph(
            "int8_qlinear",
            writer(qlinear, weight=signed),
            lambda rng, n: {"x": anything(rng, "uint8", n, 8)},
            batched=True,
        ),
        Graph(
            "int8_matmul",
            writer(
                "(uint8[n, 8] x) => (int32[n, 4] y) { y = MatMulInteger (x, weight) }",
                weight=signed,
            ),
            lambda rng, n: {"x": anything(rng, "uint8", n, 8)},
            batched=True,
        ),
        Graph("int8_qdq", writer(qdq), _rows(8), batched=True),
        Graph(
            "int8_dynamic",
            writer(dynamic, weight=signed),
            lambda rng, n: {
                "x": normal(rng, n, 8) * 10 ** integers(rng, -1, 2, n, 1, dtype=np.float32)
            },
            batched=False,
        ),
        Graph(
            "int8_dynamic_bytes",
            writer(
                "(float[n, 8] x) => (uint8[n, 8] y, float scale, uint8 zero) "
                "{ y, scale, zero = DynamicQuantizeLinear (x) }"
            ),
            _rows(8),
            batched=False,
        ),
        Graph(
            "bits",
            writer(
                "(uint32[n, 4] x, uint32[n, 4] y) => (uint32[n, 4] both, uint32[n, 4] shifted) "
                '{ both = BitwiseAnd (x, y)  shifted = BitShift <direction = "LEFT"> (x, three) }',
                three=np.array(3, np.uint32),
            ),
            lambda rng, n: {name: anything(rng, "uint32", n, 4) for name in ("x", "y")},
            batched=True,
        ),
    ]


def _recurrent() -> list[Graph]:
    """Time is the first dim: it looks like a batch and is none."""
    rng = weights("recurrent")
    lstm = (
        "(float[seq, batch, 3] x) => (float[seq, 1, batch, 4] y) "
        "{ y = LSTM <hidden_size = 4> (x, w, r) }"
    )
    gru = (
        "(float[seq, batch, 3] x) => (float[1, batch, 4] last) "
        "{ y, last = GRU <hidden_size = 4> (x, w, r) }"
    )

    def sample(rng: np.random.Generator, n: int) -> Arrays:
        return {"x": normal(rng, n, 1 + n % 3, 3)}

    return [
        Graph(
            "lstm_every_step",
            writer(lstm, w=normal(rng, 1, 16, 3), r=normal(rng, 1, 16, 4)),
            sample,
            batched=False,
            exact=False,
        ),
        Graph(
            "gru_last_step",
            writer(gru, w=normal(rng, 1, 12, 3), r=normal(rng, 1, 12, 4)),
            sample,
            batched=False,
            exact=False,
        ),
    ]


def _not_finite() -> list[Graph]:
    return [
        Graph(
            "division_by_zero",
            writer("(float[n, 4] a, float[n, 4] b) => (float[n, 4] y) { y = Div (a, b) }"),
            lambda rng, n: {
                "a": integers(rng, -1, 2, n, 4, dtype=np.float32),
                "b": np.zeros((n, 4), np.float32),
            },
            batched=True,
        ),
        Graph(
            "logarithms_of_anything",
            writer(
                "(double[n, 4] x) => (double[n, 4] y, bool[n, 4] odd) { y = Log (x)  odd = IsNaN (y) }"
            ),
            lambda rng, n: {"x": integers(rng, -2, 3, n, 4, dtype=np.float64)},
            batched=True,
        ),
    ]


def _selections() -> list[Graph]:
    """Ordering and counting within each row."""
    return [
        Graph(
            "top_three",
            writer(
                "(float[n, 9] x) => (float[n, 3] best, int64[n, 3] at) <int64[1] k = {3}> "
                "{ best, at = TopK (x, k) }"
            ),
            _rows(9),
            batched=True,
        ),
        Graph(
            "argmax",
            writer("(float[n, 9] x) => (int64[n] y) { y = ArgMax <axis = 1, keepdims = 0> (x) }"),
            _rows(9),
            batched=True,
        ),
        Graph(
            "one_hot",
            writer(
                "(int64[n] x) => (float[n, 5] y) <int64 depth = {5}, float[2] values = {0, 1}> "
                "{ y = OneHot (x, depth, values) }"
            ),
            lambda rng, n: {"x": integers(rng, 0, 5, n)},
            batched=True,
        ),
        Graph(
            "running_sums",
            writer(
                "(int64[n, 6] x) => (int64[n, 6] y) <int64 axis = {1}> { y = CumSum (x, axis) }"
            ),
            lambda rng, n: {"x": integers(rng, -9, 9, n, 6)},
            batched=True,
        ),
    ]
