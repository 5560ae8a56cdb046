"""Which models are batched, which are served one request at a time, and the reason that is given."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from gateway.errors import LoadError
from gateway.serving import batching, onnxfile
from gateway.serving.plan import Execution, LoadPlan
from gateway.serving.session import ModelSession
from tests.zoo.building import parse


@pytest.fixture
def understood(tmp_path):
    """What is found out about a graph: its signature, the reason, and the sample that ran."""

    def find(graph, *, constants=None, **settings):
        model = parse(graph, **(constants or {})) if isinstance(graph, str) else graph
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        facts = onnxfile.examine(path)
        plan = LoadPlan(str(path), **settings)
        session = ModelSession(path, facts, Execution())
        signature, why = batching.declared(session, plan)
        signature, whole_because, sample = batching.tested(session, signature, plan, facts.ops)
        return signature, whole_because or why, sample

    return find


NEGATED = "(float[n, 4] x) => (float[n, 4] y) { y = Neg (x) }"
FIXED = "(float[1, 4] x) => (float[1, 4] y) { y = Neg (x) }"
MEAN = (
    "(float[n, 4] x) => (float[n, 4] y) "
    "{ axis = Constant <value = int64[1] {0}> ()  m = ReduceMean (x, axis)  y = Sub (x, m) }"
)


def test_one_symbolic_first_dim_makes_batches(understood):
    signature, why, sample = understood(NEGATED)
    assert signature.max_batch_size == batching.DEFAULT_MAX_BATCH_SIZE
    assert why == "batches of up to 64 rows: inputs and outputs share the symbolic first dim 'n'"
    assert sample.has_rows
    assert sample.arrays(5)["x"].shape == (5, 4)


INDEPENDENT = {
    "matrix product": "(float[n, 4] x) => (float[n, 4] y) "
    "{ w = Constant <value = float[4, 4] {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}> () "
    "p = MatMul (x, w)  y = Softmax <axis = 1> (p) }",
    "variable rows": "(float[n, k] x) => (float[n, k] y) { y = Softmax <axis = 1> (x) }",
    "unknown dims within a row": "(float[n, ?] x) => (float[n, ?] y) { y = Neg (x) }",
    "several inputs": "(float[n] a, int64[n, 2] b) => (float[n] y, int64[n, 2] z) "
    "{ y = Neg (a)  z = Neg (b) }",
    "a default": "(float[n] x, float scale = {2}) => (float[n] y) { y = Mul (x, scale) }",
    "strings": "(string[n] x) => (string[n] y) { y = Identity (x) }",
    "bf16": "(bfloat16[n, 2] x) => (bfloat16[n, 2] y) { y = Identity (x) }",
    "bf16 and strings": "(bfloat16[n] x, string[n] s) => (bfloat16[n] y, string[n] t) "
    "{ y = Identity (x)  t = Identity (s) }",
    "indices": "(int64[n] x) => (float[n] y) "
    "{ table = Constant <value = float[2] {5, 6}> ()  y = Gather (table, x) }",
    "not a number": "(float[n] x) => (float[n] y) { l = Log (x)  y = Sqrt (l) }",
    "no elements": "(float[n, 0] x) => (float[n, 0] y) { y = Neg (x) }",
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_rows_are_batched(understood, name):
    signature, why, _ = understood(INDEPENDENT[name])
    assert signature.max_batch_size == 64, why


NO_BATCH_DIM = {
    "a fixed first dim": (FIXED, "the first dim of 'x' is not variable"),
    "of zero": (
        "(float[0, 4] x) => (float[0, 4] y) { y = Neg (x) }",
        "the first dim of 'x' is not variable",
    ),
    "a scalar": ("(float x) => (float y) { y = Neg (x) }", "the first dim of 'x' is not variable"),
    "an unknown rank": (
        "(float[] x) => (float[] y) { y = Neg (x) }",
        "the first dim of 'x' is not variable",
    ),
    "a scalar output": (
        "(float[n] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }",
        "the first dim of 'y' is not variable",
    ),
    "a fixed input beside": (
        "(float[n, 4] x, float[4] b) => (float[n, 4] y) { y = Add (x, b) }",
        "the first dim of 'b' is not variable",
    ),
    "two symbols": (
        "(float[n, 4] x) => (float[m, 4] y) { y = Neg (x) }",
        "the first dims of inputs and outputs are not one symbolic dim",
    ),
    "two inputs of two symbols": (
        "(float[n] a, float[m] b) => (float[n] y) { s = ReduceSum (b)  y = Add (a, s) }",
        "the first dims of inputs and outputs are not one symbolic dim",
    ),
    "dims without a name": (
        "(float[?, 4] x) => (float[?, 4] y) { y = Neg (x) }",
        "the first dims of inputs and outputs are not one symbolic dim",
    ),
    "the batch dim inside": (
        "(float[n, 4] x) => (float[n, n] y) { t = Transpose (x)  y = MatMul (x, t) }",
        "'y' has the batch dim 'n' inside, too",
    ),
    "no input": ("() => (float[2] y) { y = Constant <value = float[2] {1, 2}> () }", "no input is"),
    "no required input": (
        "(float[2] x = {1, 2}) => (float[2] y) { y = Neg (x) }",
        "no input is required",
    ),
}


@pytest.mark.parametrize("name", NO_BATCH_DIM)
def test_without_a_batch_dim_a_model_is_served_whole_and_says_why(understood, name):
    graph, reason = NO_BATCH_DIM[name]
    signature, why, sample = understood(graph)
    assert not signature.is_batched
    assert why.startswith(f"one request at a time: {reason}")
    assert sample is not None
    assert not sample.has_rows


def quantised(inputs: str, before: str) -> str:
    return (
        f"({inputs}) => (float[n, 4] y) {{ {before} "
        "q, scale, zero = DynamicQuantizeLinear (f)  y = DequantizeLinear (q, scale, zero) }"
    )


EMBEDDED = quantised(
    "int64[n, 4] ids", "rows = Gather (table, ids)  axis = Constant <value = int64[1] {1}> () "
    "f = ReduceMean <keepdims = 0> (rows, axis)"
)  # fmt: skip
TABLE = {"table": np.array([[1, 2, 3, 4], [-7, 5.5, 0.25, 9]], np.float32)}

DEPENDENT = {
    "a mean over the batch": MEAN,
    "the same, other dims variable": MEAN.replace("4]", "k]"),
    "a softmax over the batch": "(float[n, 4] x) => (float[n, 4] y) { y = Softmax <axis = 0> (x) }",
    "a running sum": "(float[n, 4] x) => (float[n, 4] y) "
    "{ axis = Constant <value = int64 {0}> ()  y = CumSum (x, axis) }",
    "integers in reverse order": "(int64[n] x) => (int64[n] y) "
    "{ a = Constant <value = int64[1] {-1}> ()  e = Constant <value = int64[1] {-1000}> () "
    "z = Constant <value = int64[1] {0}> ()  y = Slice (x, a, e, z, a) }",
    "strings in reverse order": "(string[n] x, float[n] f) => (string[n] y, float[n] g) "
    "{ a = Constant <value = int64[1] {-1}> ()  e = Constant <value = int64[1] {-1000}> () "
    "z = Constant <value = int64[1] {0}> ()  y = Slice (x, a, e, z, a)  g = Neg (f) }",
    "the largest of the batch": "(float[n] x) => (float[n] y) { m = ReduceMax (x)  y = Div (x, m) }",
    "a scale of the batch": quantised("float[n, 4] x", "f = Neg (x)"),
    "a scale of the batch, of whole numbers": EMBEDDED,
    "only large whole numbers show it": "(int64[n] x) => (int64[n] y) "
    "<int64[1] a = {0}, int64 k = {100}> "
    "{ m = ReduceMax <keepdims = 1> (x, a)  d = Div (m, k)  y = Add (x, d) }",
    "a width for the largest": "(int64[n] x) => (bool[n, k] y) <int64 zero = {0}, int64 one = {1}, "
    "int64[1] first = {0}, int64[1] second = {1}, int64 eight = {8}> "
    "{ m = ReduceMax <keepdims = 0> (x, first)  d = Div (m, eight)  e = Add (d, one) "
    "k = Mul (e, eight)  r = Range (zero, k, one)  c = Unsqueeze (x, second)  y = Less (r, c) }",
    "only its largest rows show it": "(float[n, 4] x) => (float[n, 4] y) "
    "{ m = ReduceMax (x)  limit = Constant <value = float {20}> ()  r = Max (m, limit) "
    "y = Div (x, r) }",
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_rows_that_depend_on_their_mates_are_served_one_by_one(understood, name):
    signature, why, sample = understood(DEPENDENT[name], constants=TABLE)
    assert not signature.is_batched
    assert why.startswith("one request at a time: its rows' answers change with the other rows")
    assert sample.dims[0][0] == batching.ROWS  # the first dim is now one like the others
    assert sample.arrays(1).keys() == {spec.name for spec in signature.inputs}


def test_settings_may_accept_what_the_batch_does(understood):
    signature, why, _ = understood(MEAN, accept_batch_effects=True)
    assert signature.max_batch_size == 64
    assert why.startswith("batches of up to 64 rows")


@pytest.mark.parametrize("settings", [{"max_batch_size": 8}, {"allowed_batch_sizes": (4, 8)}])
def test_settings_that_ask_for_batches_do_not_make_rows_independent(understood, settings):
    signature, why, _ = understood(MEAN, **settings)
    assert (signature.max_batch_size, signature.allowed_batch_sizes) == (0, ())
    assert "its rows' answers change" in why
    signature, _, _ = understood(MEAN, accept_batch_effects=True, **settings)
    assert signature.max_batch_size == 8


def test_a_contributed_operator_that_quantises_the_batch_is_found(understood):
    """The scale differs by so little here that only an exact comparison shows it."""
    weights = np.full((4, 4), 1, np.uint8)
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Gather", ["table", "ids"], ["rows"]),
                helper.make_node("ReduceMean", ["rows"], ["f"], axes=[1], keepdims=0),
                helper.make_node(
                    "DynamicQuantizeMatMul", ["f", "w", "s", "z"], ["p"], domain="com.microsoft"
                ),
                helper.make_node("Mul", ["p", "small"], ["scaled"]),
                helper.make_node("Add", ["scaled", "large"], ["y"]),
            ],
            "g",
            [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", 4])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
            [
                onnx.numpy_helper.from_array(TABLE["table"], "table"),
                onnx.numpy_helper.from_array(weights, "w"),
                onnx.numpy_helper.from_array(np.float32(1), "s"),
                onnx.numpy_helper.from_array(np.uint8(0), "z"),
                onnx.numpy_helper.from_array(np.float32(1e-2), "small"),
                onnx.numpy_helper.from_array(np.float32(1000), "large"),
            ],
        ),
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )
    signature, why, _ = understood(model)
    assert not signature.is_batched, why


UNEQUAL = {
    "one row": "(float[n] x) => (float[n] y) "
    "{ c = Constant <value = bool[1] {1}> ()  y = Compress <axis = 0> (x, c) }",
    "rows that the values decide": "(bool[n] x) => (float[n] y) "
    "{ f = Constant <value = float[1] {1}> ()  s = Shape (x)  e = Expand (f, s) "
    "y = Compress <axis = 0> (e, x) }",
}


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("accepted", [False, True])
def test_outputs_without_a_row_for_each_row_are_never_batched(understood, name, accepted):
    signature, why, _ = understood(UNEQUAL[name], accept_batch_effects=accepted)
    assert not signature.is_batched
    assert why == (
        "one request at a time: output 'y' does not have a row for each row of the inputs"
    )


def test_a_model_that_runs_only_on_some_numbers_of_rows_is_served_whole(understood):
    triples = "(float[n] x) => (float[n] y) { s = Constant <value = int64[2] {-1, 3}> () " \
        "t = Reshape (x, s)  u = Neg (t)  r = Constant <value = int64[1] {-1}> () " \
        "y = Reshape (u, r) }"  # fmt: skip
    signature, why, _ = understood(triples, accept_batch_effects=True)
    assert not signature.is_batched
    assert why == "one request at a time: it does not run on each number of rows"


def test_settings_say_how_many_rows(understood):
    signature, why, _ = understood(NEGATED, max_batch_size=7)
    assert (signature.max_batch_size, signature.allowed_batch_sizes) == (7, ())
    assert why == "batches of up to 7 rows: its settings say so"
    signature, _, _ = understood(NEGATED, allowed_batch_sizes=(2, 6))
    assert (signature.max_batch_size, signature.allowed_batch_sizes) == (6, (2, 6))
    signature, why, _ = understood(NEGATED, max_batch_size=0)
    assert not signature.is_batched
    assert why == "one request at a time: max_batch_size is 0"


@pytest.mark.parametrize("name", ["two symbols", "dims without a name"])
def test_settings_may_say_that_two_dims_are_the_batch(understood, name):
    signature, _, _ = understood(NO_BATCH_DIM[name][0], max_batch_size=8)
    assert signature.max_batch_size == 8


@pytest.mark.parametrize("settings", [{"max_batch_size": 8}, {"allowed_batch_sizes": (4, 8)}])
@pytest.mark.parametrize(
    "graph",
    [
        FIXED,
        "(float x) => (float y) { y = Neg (x) }",
        "(float[] x) => (float[] y) { y = Neg (x) }",
        "(float[n] a, float[2] x) => (float[n] y) { y = Neg (a) }",
    ],
)
def test_settings_cannot_ask_for_batches_of_a_dim_that_is_not_there(understood, graph, settings):
    with pytest.raises(LoadError, match="max_batch_size is set, but the first dim of input 'x'"):
        understood(graph, **settings)


def test_settings_that_ask_for_batches_of_a_batch_dim_inside_are_not_followed(understood):
    signature, why, _ = understood(NO_BATCH_DIM["the batch dim inside"][0], max_batch_size=8)
    assert not signature.is_batched
    assert "inside, too" in why


PICKY = "(int64[n] x) => (float[n] y) { y = Gather (table, x) }"
NO_ROW = {"table": np.empty(0, np.float32)}


def test_where_no_made_up_input_runs_only_settings_make_batches(understood):
    signature, why, sample = understood(PICKY, constants=NO_ROW)
    assert not signature.is_batched
    assert why == (
        "one request at a time: no made-up input ran, so it is not known whether rows are independent"
    )
    assert sample is None
    signature, why, sample = understood(PICKY, constants=NO_ROW, max_batch_size=4)
    assert signature.max_batch_size == 4
    assert sample is None


def test_a_sample_is_found_where_only_some_dims_or_values_run(understood):
    """Nine columns are what two valid 3x3 convolutions need; zero is the one index that is there."""
    stack = (
        "(float[n, 1, h, w] x) => (float[n, 1, a, b] y) "
        "{ k = Constant <value = float[1, 1, 3, 3] {1, 1, 1, 1, 1, 1, 1, 1, 1}> () "
        "c = Conv <strides = [3, 3]> (x, k)  y = Conv (c, k) }"
    )
    signature, _, sample = understood(stack)
    assert signature.max_batch_size == 64
    assert sample.dims == ((1, 16, 16),)
    _, _, sample = understood(PICKY, constants={"table": np.ones(1, np.float32)})
    assert sample.kind == "zeros"


def test_a_sample_is_the_same_each_time_and_its_first_rows_whatever_their_number(understood):
    _, _, sample = understood(NEGATED)
    three, five = sample.arrays(3)["x"], sample.arrays(5)["x"]
    np.testing.assert_array_equal(three, five[:3])
    np.testing.assert_array_equal(three, sample.arrays(3)["x"])
