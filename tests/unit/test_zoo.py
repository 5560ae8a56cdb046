"""The zoo is what it says: it runs, it covers every kind of tensor, and its graphs batch as they claim."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from gateway.names import NAME
from gateway.tensors import DATATYPES, MAX_RANK
from tests.zoo.building import MODEL_FILE, NEWEST_OPSET, Arrays, Graph
from tests.zoo.direct import DirectModel, assert_equal
from tests.zoo.graphs import all_graphs, write_version
from tests.zoo.hostile import all_hostile
from tests.zoo.networks import OLDEST_OPSET

GRAPHS = all_graphs()
LEAST_FAMILIES = 64
LEAST_HOSTILE = 32
ROWS = (1, 2, 3, 5, 8, 16, 33, 64)
SEED = 7

OPERATORS = """
    If Loop Scan NonZero Unique Compress Where TopK Range NonMaxSuppression Reshape Slice Tile Expand
    ConstantOfShape Softmax ReduceMean CumSum DynamicQuantizeLinear QLinearMatMul MatMulInteger
    QuantizeLinear DequantizeLinear Conv LSTM GRU Gather Div Log StringConcat StringSplit
    StringNormalizer RegexFullMatch Equal Identity Concat
"""
"""Those that a gateway could treat wrongly, each in its own way; some graph must have each."""

one_graph = pytest.mark.parametrize("graph", GRAPHS, ids=str)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> dict[str, onnx.ModelProto]:
    """Every model, external data left aside."""
    repository = tmp_path_factory.mktemp("zoo")
    return {
        graph.name: onnx.load(
            write_version(graph, repository) / MODEL_FILE, load_external_data=False
        )
        for graph in GRAPHS
    }


def dims(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """An int for a fixed dim, the name of a symbolic one, "" for an unnamed; None: rank unknown."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]


def required(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs without a default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in defaults]


def looks_batched(model: DirectModel) -> bool:
    """Whether every required input and every output shares one symbolic first dim."""
    values = (*model.session.get_inputs(), *model.session.get_outputs())
    first = {value.shape[0] if value.shape else None for value in values}
    return len(first) == 1 and isinstance(first.pop(), str)


def test_names_are_distinct_and_name_models():
    names = [model.name for model in (*GRAPHS, *all_hostile())]
    assert len({name.lower() for name in names}) == len(names)
    assert all(NAME.fullmatch(name) for name in names)


def test_there_are_enough_hostile_models():
    assert len(all_hostile()) >= LEAST_HOSTILE


def test_there_are_enough_families():
    """What only differs in opset, rank or datatype counts once."""
    families = {re.sub(r"_\d+$|(?<=^twice)_.*", "", graph.name) for graph in GRAPHS}
    assert len(families) >= LEAST_FAMILIES


@pytest.mark.parametrize("role", ["input", "output"])
def test_every_datatype_and_every_rank_is_there(zoo, role):
    values = [value for model in zoo.values() for value in getattr(model.graph, role)]
    datatypes = {value.type.tensor_type.elem_type for value in values}
    assert datatypes == {datatype.onnx for datatype in DATATYPES.values()}
    ranks = {None if (shape := dims(value)) is None else len(shape) for value in values}
    assert ranks == {None, *range(MAX_RANK + 1)}


def test_every_kind_of_first_dim_is_there(zoo):
    first = [shape[0] for m in zoo.values() for v in required(m) if (shape := dims(v))]
    assert {0, 1, 2, "", "n"} <= set(first)


def test_every_opset_is_there(zoo):
    opsets = {entry.version for model in zoo.values() for entry in model.opset_import}
    assert opsets >= set(range(OLDEST_OPSET, NEWEST_OPSET + 1))


def test_only_operators_of_onnx_and_all_that_matter(zoo):
    nodes = [node for model in zoo.values() for node in model.graph.node]
    assert {node.domain for node in nodes} == {""}
    assert {node.op_type for node in nodes} >= set(OPERATORS.split())


def test_optional_inputs_and_external_data_are_there(zoo):
    assert sum(len(required(m)) < len(m.graph.input) for m in zoo.values()) >= 4
    places = [t.data_location for model in zoo.values() for t in model.graph.initializer]
    assert places.count(onnx.TensorProto.EXTERNAL) >= 4


@one_graph
def test_it_is_the_same_model_with_the_same_answers_each_time(graph: Graph, tmp_path: Path):
    folders = [write_version(graph, tmp_path / name) for name in ("first", "second")]
    files = [
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in folders
    ]
    assert files[0] == files[1]
    models = [DirectModel(folder) for folder in folders]
    rngs = [np.random.default_rng(SEED) for _ in folders]
    for rows in ROWS:
        samples = [graph.sample(rng, rows) for rng in rngs]
        assert_equal(samples[0], samples[1])
        assert_equal(models[0].run(samples[0]), models[1].run(samples[1]))


def alone(model: DirectModel, inputs: Arrays, rows: int) -> Arrays:
    """The answers to each row by itself, in a row; optional inputs go with every one."""
    optional = {value.name for value in model.session.get_overridable_initializers()}
    answers = [
        model.run({n: a if n in optional else a[row : row + 1] for n, a in inputs.items()})
        for row in range(rows)
    ]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


@one_graph
def test_rows_are_independent_exactly_where_it_is_batched(graph: Graph, tmp_path: Path):
    model = DirectModel(write_version(graph, tmp_path))
    if graph.batched:
        assert looks_batched(model)
    elif graph.config or not looks_batched(model):
        return  # there are no rows
    rng = np.random.default_rng(SEED)
    differences = 0
    for rows in ROWS:
        inputs = graph.sample(rng, rows)
        try:
            rtol = None if graph.exact else graph.rtol
            assert_equal(alone(model, inputs, rows), model.run(inputs), rtol)
        except (AssertionError, ValueError):  # ValueError: rows of different shapes
            if graph.batched:
                raise
            differences += 1
    assert graph.batched or differences
