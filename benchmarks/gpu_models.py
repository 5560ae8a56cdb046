"""Two networks of the shapes that GPUs are bought for, with random weights: what a run costs is the same.

Each function writes its model to a path; ``dtype`` is the type of weights and activations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from models import GraphWriter
from onnx import TensorProto

ONNX_TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}

IMAGE = (3, 224, 224)
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
"""ResNet-50's stages: how many bottlenecks, and their inner width. He et al., 2015, table 1."""

VOCABULARY = 30_522
LENGTH = 128
WIDTH = 768
HEADS = 12
HIDDEN = 3072
LAYERS = 12
"""BERT-base. Devlin et al., 2018, section 3."""


class Network:
    """A graph being written, with layers of one type."""

    def __init__(self, name: str, dtype: type) -> None:
        self.graph = GraphWriter(name)
        self.dtype = dtype

    def weights(self, *dims: int, gain: float = 1.0) -> str:
        """Random weights that keep the variance of what goes through them."""
        fan_in = int(np.prod(dims[1:])) if len(dims) == 4 else dims[0]
        values = self.graph.rng.standard_normal(dims, np.float32) * (gain / fan_in) ** 0.5
        return self.graph.constant(values, self.dtype)

    def zeros(self, *dims: int) -> str:
        """A bias that changes nothing."""
        return self.graph.constant(np.zeros(dims), self.dtype)

    def convolution(self, x: str, wide: int, width: int, size: int, stride: int = 1) -> str:
        """A convolution with a bias, as batch normalisation leaves it once it is folded in."""
        pad = size // 2
        return self.graph.node(
            "Conv", x, self.weights(width, wide, size, size), self.zeros(width),
            strides=[stride, stride], pads=[pad] * 4, kernel_shape=[size, size],
        )  # fmt: skip

    def dense(self, x: str, wide: int, width: int) -> str:
        """A matrix product and a bias."""
        product = self.graph.node("MatMul", x, self.weights(wide, width))
        return self.graph.node("Add", product, self.zeros(width))

    def normalized(self, x: str) -> str:
        """A layer normalisation."""
        scale = self.graph.constant(np.ones(WIDTH), self.dtype)
        return self.graph.node("LayerNormalization", x, scale, self.zeros(WIDTH), axis=-1)

    def number(self, value: float) -> str:
        """A constant."""
        return self.graph.constant(value, self.dtype)


def resnet50(path: Path, dtype: type) -> None:
    """`image` [batch, 3, 224, 224] -> `logits` [batch, 1000]."""
    net = Network("resnet50", dtype)
    g = net.graph
    x = g.input("image", ONNX_TYPES[dtype], IMAGE)
    x = g.node("Relu", net.convolution(x, 3, 64, 7, stride=2))
    x = g.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    wide = 64
    for stage, (blocks, inner) in enumerate(STAGES):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = g.node("Relu", net.convolution(x, wide, inner, 1))
            y = g.node("Relu", net.convolution(y, inner, inner, 3, stride))
            y = net.convolution(y, inner, 4 * inner, 1)
            if not block:
                x = net.convolution(x, wide, 4 * inner, 1, stride)
            wide = 4 * inner
            x = g.node("Relu", g.node("Mul", g.node("Add", x, y), net.number(0.7)))
    x = g.node("Flatten", g.node("GlobalAveragePool", x))
    product = g.node("MatMul", x, net.weights(wide, 1000))
    g.node("Add", product, net.zeros(1000), out="logits")
    g.output("logits", ONNX_TYPES[dtype], [1000])
    g.write(path)


def bert_base(path: Path, dtype: type) -> None:
    """`input_ids` and `attention_mask` INT64 [batch, 128] -> `hidden` [batch, 768] of the first token."""
    net = Network("bert_base", dtype)
    g = net.graph
    ids = g.input("input_ids", TensorProto.INT64, [LENGTH])
    mask = g.input("attention_mask", TensorProto.INT64, [LENGTH])
    words = g.node("Gather", net.weights(VOCABULARY, WIDTH, gain=VOCABULARY), ids)
    x = net.normalized(g.node("Add", words, net.weights(LENGTH, WIDTH, gain=LENGTH)))
    there = g.node("Cast", mask, to=ONNX_TYPES[dtype])
    away = g.node("Mul", g.node("Sub", there, net.number(1)), net.number(10_000))
    away = g.node("Unsqueeze", away, g.constant([1, 2], np.int64))
    for _layer in range(LAYERS):
        x = net.normalized(g.node("Add", x, _attention(net, x, away)))
        inner = net.dense(x, WIDTH, HIDDEN)
        erf = g.node("Erf", g.node("Mul", inner, net.number(2**-0.5)))
        gelu = g.node(
            "Mul", g.node("Mul", inner, g.node("Add", erf, net.number(1))), net.number(0.5)
        )
        x = net.normalized(g.node("Add", x, net.dense(gelu, HIDDEN, WIDTH)))
    g.node("Gather", x, g.constant(0, np.int64), out="hidden", axis=1)
    g.output("hidden", ONNX_TYPES[dtype], [WIDTH])
    g.write(path)


def _attention(net: Network, x: str, away: str) -> str:
    """Multi-head self-attention; ``away`` is added to the scores of what is masked."""
    g, head = net.graph, WIDTH // HEADS
    split = g.constant([0, LENGTH, HEADS, head], np.int64)
    joined = g.constant([0, LENGTH, WIDTH], np.int64)

    def heads(order: list[int]) -> str:
        return g.node("Transpose", g.node("Reshape", net.dense(x, WIDTH, WIDTH), split), perm=order)

    query, key, value = heads([0, 2, 1, 3]), heads([0, 2, 3, 1]), heads([0, 2, 1, 3])
    scores = g.node("Mul", g.node("MatMul", query, key), net.number(head**-0.5))
    weights = g.node("Softmax", g.node("Add", scores, away), axis=-1)
    mixed = g.node("Transpose", g.node("MatMul", weights, value), perm=[0, 2, 1, 3])
    return net.dense(g.node("Reshape", mixed, joined), WIDTH, WIDTH)
