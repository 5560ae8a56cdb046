"""Graphs whose interface is not what it seems: optional inputs, outputs without a node, odd names, lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.zoo.building import MODEL_FILE, Arrays, Graph, Sample, Write, normal, parse, writer


def graphs() -> list[Graph]:
    """All of this module."""
    return [*_optional_inputs(), *_passed_through()]


def _optional_inputs() -> list[Graph]:
    """Initializers that are inputs too: a request may leave them out."""

    def scaled(*extra: int, name: str = "scale") -> Sample:
        def sample(rng: np.random.Generator, n: int) -> Arrays:
            given = {} if n % 2 else {name: normal(rng, *extra)}
            return {"x": normal(rng, n, 3), **given}

        return sample

    defaults = [f"float[2] w{i} = {{{i}, 1}}" for i in range(40)]
    return [
        Graph(
            "optional_vector",
            writer(
                "(float[n, 3] x, float[3] scale = {1, 2, 3}) => (float[n, 3] y) { y = Mul (x, scale) }"
            ),
            scaled(3),
            batched=True,
        ),
        Graph(
            "optional_scalar",
            writer("(float[n, 3] x, float scale = {2}) => (float[n, 3] y) { y = Mul (x, scale) }"),
            scaled(),
            batched=True,
        ),
        Graph(
            "weights_as_inputs",  # as old exporters write them
            writer(
                f"(float[n, 2] x, {', '.join(defaults)}) => (float[n, 2] y) "
                f"{{ y = Sum (x, {', '.join(f'w{i}' for i in range(len(defaults)))}) }}"
            ),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=True,
        ),
        Graph(
            "optional_without_batch",
            writer(
                "(float[k, 3] x, float[1, 3] offset = {1, 2, 3}) => (float[m, 3] y) "
                "{ y = Concat <axis = 0> (x, offset) }"
            ),
            scaled(1, 3, name="offset"),
            batched=False,
        ),
        Graph(
            "only_optional",
            writer("(float[2] x = {1, 2}) => (float[2] y) { y = Neg (x) }"),
            lambda rng, n: {"x": normal(rng, 2)},
            batched=False,
        ),
    ]


_ODD_INPUT = "ü\n\0 'x'"


def _renamed(text: str, **names: str) -> Write:
    """Writes a model of one node whose tensors have names that the textual syntax does not have."""

    def write(folder: Path) -> None:
        model = parse(text)
        (node,) = model.graph.node
        for value in (*model.graph.input, *model.graph.output):
            value.name = names[value.name]
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
        onnx.save(model, folder / MODEL_FILE)

    return write


def _passed_through() -> list[Graph]:
    """Outputs that no node makes, and those that are declared as what they are not."""
    return [
        Graph(
            "odd_names",
            _renamed(
                "(float[n, 2] x) => (float[n, 2] y) { y = Neg (x) }", x=_ODD_INPUT, y="日本\t😀"
            ),
            lambda rng, n: {_ODD_INPUT: normal(rng, n, 2)},
            batched=True,
        ),
        Graph(
            "output_is_input",
            writer("(float[n, 2] x) => (float[n, 2] x, float[n, 2] y) { y = Neg (x) }"),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=True,
        ),
        Graph(
            "identity_alone",
            writer(
                "(float[n, 2] x) => (float[n, 2] y, float[n, 2] z) { y = Identity (x)  z = Identity (x) }"
            ),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=True,
        ),
        Graph(
            "output_is_initializer",
            writer(
                "(float[n, 2] x) => (float[n, 2] y, int64[3] version) "
                "<int64[3] version = {1, 2, 3}> { y = Neg (x) }"
            ),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=False,
        ),
        Graph(
            "inner_dim_doubles",
            writer("(float[n, d] x) => (float[n, d] y) { y = Concat <axis = 1> (x, x) }"),
            lambda rng, n: {"x": normal(rng, n, 1 + n % 4)},
            batched=True,
        ),
        Graph(
            "more_dims_declared",  # ONNX Runtime then says that there are none
            writer("(float[n, 4] x) => (float[n, 4, 4] y) { y = Relu (x) }"),
            lambda rng, n: {"x": normal(rng, n, 4)},
            batched=False,
        ),
        Graph(
            "first_dim_doubles",
            writer("(float[n, 2] x) => (float[n, 2] y) { y = Concat <axis = 0> (x, x) }"),
            lambda rng, n: {"x": normal(rng, n, 2)},
            batched=False,
        ),
    ]
