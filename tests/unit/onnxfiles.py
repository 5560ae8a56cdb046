"""Model files for tests: built with onnx, and what onnx itself says of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def value(name, shape, element=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, element, shape)


def model(nodes=(), *, inputs=(), outputs=(), initializers=(), functions=(), **more):
    graph = helper.make_graph(
        list(nodes), "g", list(inputs) or [value("x", ["N", 3])], list(outputs) or [value("y", None)],
        list(initializers),
    )  # fmt: skip
    more.setdefault("opset_imports", [helper.make_opsetid("", 17)])
    return helper.make_model(graph, ir_version=9, functions=list(functions), **more)


def tensor(name="w", values=VALUES):
    return numpy_helper.from_array(values, name)


def external(name="w", location="w.bin", dims=(2, 3), element=TensorProto.FLOAT, **entries):
    """A tensor whose data is in a file; entries are given as they are to be written."""
    made = TensorProto(name=name, data_type=element, dims=dims)
    made.data_location = TensorProto.EXTERNAL
    if location is not None:
        entries = {"location": location, **entries}
    for key, text in entries.items():
        made.external_data.add(key=key, value=str(text))
    return made


def sparse(values, indices=None):
    return onnx.SparseTensorProto(
        values=values,
        indices=indices or tensor("", np.array([0, 1, 2, 3, 4, 5], np.int64)),
        dims=[100],
    )


def subgraph(*initializers, nodes=()):
    return helper.make_graph(list(nodes), "inner", [], [value("inner_y", None)], list(initializers))


def conditional(then_branch, else_branch):
    return helper.make_node("If", ["c"], ["y"], then_branch=then_branch, else_branch=else_branch)


def function(*nodes, name="Twice"):
    return helper.make_function(
        "local", name, ["a"], ["b"], list(nodes), [helper.make_opsetid("", 17)]
    )


PLACES = {
    "initializer": lambda t: model([helper.make_node("Add", ["x", "w"], ["y"])], initializers=[t]),
    "attribute": lambda t: model([helper.make_node("Constant", [], ["y"], value=t)]),
    "attribute-list": lambda t: model([helper.make_node("Custom", [], ["y"], many=[tensor(), t])]),
    "subgraph": lambda t: model([conditional(subgraph(), subgraph(t))]),
    "subgraph-of-subgraph": lambda t: model(
        [conditional(subgraph(nodes=[conditional(subgraph(), subgraph(t))]), subgraph())]
    ),
    "graph-list": lambda t: model(
        [helper.make_node("Custom", [], ["y"], g=[subgraph(), subgraph(t)])]
    ),
    "function": lambda t: model(
        functions=[function(helper.make_node("Constant", [], ["b"], value=t))]
    ),
    "function-default": lambda t: _with_default(t),
    "sparse-values": lambda t: _with_sparse(sparse(t)),
    "sparse-indices": lambda t: _with_sparse(sparse(tensor("w", np.zeros(6, np.float32)), t)),
    "sparse-attribute": lambda t: model(
        [helper.make_node("Constant", [], ["y"], sparse_value=sparse(t))]
    ),
    "sparse-list": lambda t: model([helper.make_node("Custom", [], ["y"], s=[sparse(t)])]),
    "training": lambda t: _with_training(t),
}
"""Every place of a model that can hold a tensor: a function that puts one there."""


def _with_default(made):
    definition = function(helper.make_node("Constant", [], ["b"], value_int=1))
    definition.attribute_proto.append(helper.make_attribute("v", made))
    return model(functions=[definition])


def _with_sparse(made):
    whole = model()
    whole.graph.sparse_initializer.append(made)
    return whole


def _with_training(made):
    whole = model([helper.make_node("Relu", ["x"], ["y"])])
    info = whole.training_info.add()
    info.algorithm.CopyFrom(subgraph(made, nodes=[helper.make_node("Adam", ["a"], ["b"])]))
    return whole


def graphs_of(whole) -> Iterator[onnx.GraphProto]:
    """The graphs that ONNX Runtime runs, by onnx's own parser; functions' bodies as if graphs."""
    waiting = [whole.graph]
    waiting += [onnx.GraphProto(node=f.node) for f in whole.functions]
    waiting += [
        onnx.GraphProto(node=[onnx.NodeProto(op_type="", attribute=f.attribute_proto)])
        for f in whole.functions
    ]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def text(string) -> str:
    """A string field, which onnx gives as bytes where it is not UTF-8."""
    return string.decode("utf-8", "backslashreplace") if isinstance(string, bytes) else string


def domain(string) -> str:
    return "" if string == "ai.onnx" else text(string)


def ops_of(whole) -> set[str]:
    found = set()
    for graph in graphs_of(whole):
        for node in graph.node:
            prefix = f"{domain(node.domain)}::" if domain(node.domain) else ""
            found.add(prefix + text(node.op_type))
    return found - {""}


def tensors_of(whole) -> Iterator[TensorProto]:
    graphs = list(graphs_of(whole))
    for info in whole.training_info:
        for graph in (info.initialization, info.algorithm):
            graphs += graphs_of(onnx.ModelProto(graph=graph))
    for graph in graphs:
        yield from graph.initializer
        packs = list(graph.sparse_initializer)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                packs += [attribute.sparse_tensor, *attribute.sparse_tensors]
        for pack in packs:
            yield from (pack.values, pack.indices)


def locations_of(whole) -> set[str]:
    return {
        text(entry.value)
        for made in tensors_of(whole)
        if made.data_location == TensorProto.EXTERNAL
        for entry in made.external_data
        if entry.key == "location"
    }


def unranked_of(whole) -> set[str]:
    return {
        text(v.name)
        for v in (*whole.graph.input, *whole.graph.output)
        if v.type.HasField("tensor_type") and not v.type.tensor_type.HasField("shape")
    }


def defaults_of(whole) -> set[str]:
    given = {text(t.name) for t in whole.graph.initializer}
    given |= {text(s.values.name) for s in whole.graph.sparse_initializer}
    return given & {text(v.name) for v in whole.graph.input}


def opsets_of(whole) -> dict[str, int]:
    return {domain(o.domain): o.version for o in whole.opset_import}
