"""Models of sequences of tokens, for `padding.py`: small ONNX graphs with random weights, and their traffic.

All take `input_ids` and `attention_mask`, INT64 [batch, seq]. See `models.py` for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from models import GraphWriter
from onnx import GraphProto, NodeProto, TensorProto, helper

LABELS = 9
TAGGER_WIDTH = 128
TAGGER_HEADS = 2
SENTENCE_WIDTH = 64

LABELLER_WIDTH = 64
SPREAD_OF_LOGS = 0.75

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Traffic:
    """What a model is asked: sequences whose lengths are log-normal.

    Attributes:
        unit: what a token is, in the plural.
        vocabulary: how many tokens there are.
        median, longest: of the lengths, in tokens.
        buckets: the lengths that are padded to, ascending; the last is `longest`.
    """

    unit: str
    vocabulary: int
    median: int
    longest: int
    buckets: tuple[int, ...]

    def lengths(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths, cut to 1..`longest`."""
        drawn = np.exp(rng.normal(np.log(self.median), SPREAD_OF_LOGS, count))
        return np.clip(np.rint(drawn), 1, self.longest).astype(int)

    def row(self, length: int, rng: np.random.Generator) -> Inputs:
        """One row of that length."""
        return {
            "input_ids": rng.integers(0, self.vocabulary, (1, length)),
            "attention_mask": np.ones((1, length), np.int64),
        }

    def bucket_of(self, length: int) -> int:
        """What a length is padded to."""
        return next(bucket for bucket in self.buckets if bucket >= length)


WORDS = Traffic("words", 8192, 20, 128, (16, 32, 64, 128))
"""Sentences, for `tagger` and `sentence`."""

CHARACTERS = Traffic("characters", 256, 80, 400, (32, 64, 128, 256, 400))
"""Names and addresses in single lines, for `labeller`."""


def tagger(path: Path) -> None:
    """Writes a tagger of tokens, one layer of a transformer, whose sequences have any length.

    `input_ids`, `attention_mask` INT64 [batch, seq] -> `logits` FP32 [batch, seq, 9]; what the mask
    has 0 for, no other token looks at.
    """
    g = GraphWriter("tagger")
    width, head_width = TAGGER_WIDTH, TAGGER_WIDTH // TAGGER_HEADS
    split = g.constant([0, 0, TAGGER_HEADS, head_width], np.int64)
    joined = g.constant([0, 0, width], np.int64)

    def normalized(x: str) -> str:
        scale, shift = g.constant(np.ones(width)), g.constant(np.zeros(width))
        return g.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)

    def heads(x: str, order: list[int]) -> str:
        projected = g.dense(x, width, width)
        return g.node("Transpose", g.node("Reshape", projected, split), perm=order)

    x, mask = _embedded(g, WORDS, width)
    x = normalized(x)
    hidden = g.node("Mul", g.node("Sub", g.constant(1), mask), g.constant(-1e9))
    bias = g.node("Unsqueeze", hidden, g.constant([1, 2], np.int64))
    query, key, value = (heads(x, order) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    scaled = g.node("Mul", g.node("MatMul", query, key), g.constant(head_width**-0.5))
    attention = g.node("Softmax", g.node("Add", scaled, bias), axis=-1)
    mixed = g.node("Transpose", g.node("MatMul", attention, value), perm=[0, 2, 1, 3])
    x = normalized(g.node("Add", x, g.dense(g.node("Reshape", mixed, joined), width, width)))
    inner = g.node("Relu", g.dense(x, width, 4 * width))
    x = normalized(g.node("Add", x, g.dense(inner, 4 * width, width)))
    g.dense(x, width, LABELS, out="logits")
    g.output("logits", TensorProto.FLOAT, ["seq", LABELS])
    g.write(path)


def sentence(path: Path) -> None:
    """Writes a classifier of sentences that costs next to nothing: the mean of the embeddings.

    `input_ids`, `attention_mask` INT64 [batch, seq] -> `logits` FP32 [batch, 9].
    """
    g = GraphWriter("sentence")
    _classified(g, _mean(g), out="logits")
    g.write(path)


def labeller(path: Path) -> None:
    """Writes a labeller of characters as recognisers of names are: a convolution and a linear-chain CRF.

    `input_ids`, `attention_mask` INT64 [batch, seq] -> `logits` FP32 [batch, seq, 9]: for each character the
    probability of each label, by the forward-backward algorithm. That takes two steps a character, one after
    the other, each over all rows of the batch: they cost by the step and hardly by the row.
    """
    g = GraphWriter("labeller")
    x, mask = _embedded(g, CHARACTERS, LABELLER_WIDTH)
    by_token = g.node("Unsqueeze", mask, g.constant([2], np.int64))
    kept = g.node("Transpose", g.node("Mul", x, by_token), perm=[0, 2, 1])
    weights = g.rng.standard_normal((LABELLER_WIDTH, LABELLER_WIDTH, 3))
    kernel = g.constant(weights / np.sqrt(3 * LABELLER_WIDTH))
    seen = g.node("Relu", g.node("Conv", kept, kernel, pads=[1, 1]))
    scores = g.dense(g.node("Transpose", seen, perm=[0, 2, 1]), LABELLER_WIDTH, LABELS)
    is_there = g.node("Cast", by_token, to=TensorProto.BOOL)
    nothing = g.node("Mul", g.node("ReduceMax", scores, axes=[1], keepdims=0), g.constant(0))
    changes = g.constant(g.rng.standard_normal((LABELS, LABELS)) * 0.3)
    before = _scan(g, _forward_step(changes), nothing, scores, is_there, is_reverse=False)
    after = _scan(g, _backward_step(changes), nothing, scores, is_there, is_reverse=True)
    g.node("Softmax", g.node("Add", before, after), axis=-1, out="logits")
    g.output("logits", TensorProto.FLOAT, ["seq", LABELS])
    g.write(path)


def _scan(
    g: GraphWriter, body: GraphProto, start: str, scores: str, is_there: str, *, is_reverse: bool
) -> str:
    """Goes over the tokens; what the body gives for each of them."""
    end, each = f"end_{body.name}", f"each_{body.name}"
    direction = [int(is_reverse)]
    g.nodes.append(
        helper.make_node(
            "Scan",
            [start, scores, is_there],
            [end, each],
            body=body,
            num_scan_inputs=2,
            scan_input_axes=[1, 1],
            scan_output_axes=[1],
            scan_input_directions=direction * 2,
            scan_output_directions=direction,
        )
    )
    return each


def _forward_step(changes: str) -> GraphProto:
    """The log of the sum over all paths that end in each label, this token's score included."""
    nodes = [
        helper.make_node("Unsqueeze", ["state", "last"], ["column"]),
        helper.make_node("Add", ["column", changes], ["paths"]),
        helper.make_node("ReduceLogSumExp", ["paths"], ["sums"], axes=[1], keepdims=0),
        helper.make_node("Add", ["sums", "score"], ["new"]),
        helper.make_node("Where", ["there", "new", "state"], ["next"]),
        helper.make_node("Identity", ["next"], ["each"]),
    ]
    return _step("forward", nodes)


def _backward_step(changes: str) -> GraphProto:
    """The log of the sum over all paths that begin in each label, this token's score left out."""
    nodes = [
        helper.make_node("Identity", ["state"], ["each"]),
        helper.make_node("Add", ["state", "score"], ["scored"]),
        helper.make_node("Unsqueeze", ["scored", "middle"], ["row"]),
        helper.make_node("Add", ["row", changes], ["paths"]),
        helper.make_node("ReduceLogSumExp", ["paths"], ["sums"], axes=[2], keepdims=0),
        helper.make_node("Where", ["there", "sums", "state"], ["next"]),
    ]
    return _step("backward", nodes)


def _step(name: str, nodes: list[NodeProto]) -> GraphProto:
    """The body of a Scan: a state, a token's scores and whether it is there; the next state."""
    labels = ["batch", LABELS]
    return helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info("state", TensorProto.FLOAT, labels),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, labels),
            helper.make_tensor_value_info("there", TensorProto.BOOL, ["batch", 1]),
        ],
        [
            helper.make_tensor_value_info("next", TensorProto.FLOAT, labels),
            helper.make_tensor_value_info("each", TensorProto.FLOAT, labels),
        ],
        [
            helper.make_tensor("last", TensorProto.INT64, [1], [2]),
            helper.make_tensor("middle", TensorProto.INT64, [1], [1]),
        ],
    )


def _mean(g: GraphWriter) -> str:
    """Adds the inputs, and the mean of the embeddings that the mask keeps."""
    x, mask = _embedded(g, WORDS, SENTENCE_WIDTH)
    kept = g.node("Mul", x, g.node("Unsqueeze", mask, g.constant([2], np.int64)))
    axis = g.constant([1], np.int64)
    total = g.node("ReduceSum", kept, axis, keepdims=0)
    return g.node("Div", total, g.node("ReduceSum", mask, axis, keepdims=1))


def _classified(g: GraphWriter, x: str, out: str | None = None) -> str:
    """Adds a hidden layer and the labels, and declares the output `logits`."""
    g.output("logits", TensorProto.FLOAT, [LABELS])
    inner = g.node("Relu", g.dense(x, SENTENCE_WIDTH, SENTENCE_WIDTH))
    return g.dense(inner, SENTENCE_WIDTH, LABELS, out=out)


def _embedded(g: GraphWriter, traffic: Traffic, width: int) -> tuple[str, str]:
    """Adds the inputs; the embeddings, and the mask as FP32."""
    ids = g.input("input_ids", TensorProto.INT64, ["seq"])
    mask = g.input("attention_mask", TensorProto.INT64, ["seq"])
    table = g.constant(g.rng.standard_normal((traffic.vocabulary, width)))
    return g.node("Gather", table, ids), g.node("Cast", mask, to=TensorProto.FLOAT)


MODELS = {
    "labeller": (labeller, CHARACTERS),
    "tagger": (tagger, WORDS),
    "sentence": (sentence, WORDS),
}
"""What writes each, and its traffic."""
