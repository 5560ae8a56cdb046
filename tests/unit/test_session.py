"""Sessions: what is bound where, what comes out of which datatype, and that nobody phones home."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gateway.errors import LoadError
from gateway.serving import geometry, onnxfile, strings
from gateway.serving.plan import Execution
from gateway.serving.session import MAX_OPTIONAL_INPUTS, ModelSession, RunError
from gateway.tensors import DATATYPES, Signature
from tests.zoo.building import parse

BF16_LIMITS = np.array([0, 1.5, -2, 3e38, np.inf, np.nan], ml_dtypes.bfloat16).view(np.uint16)

ODD = [b"", b"plain", "zürich".encode(), b"\0", b"a\0b", "😀".encode()]
NOT_TEXT = [b"\xff", b"a\xfe\0", b"", b"plain", b"\xed\xa0\x80", b"x" * 300]


@pytest.fixture
def session(tmp_path):
    """Opens a graph in the textual syntax, or a model."""

    def make(graph, execution=None, **constants) -> ModelSession:
        model = parse(graph, **constants) if isinstance(graph, str) else graph
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return ModelSession(path, onnxfile.examine(path), execution or Execution())

    return make


def texts(elements, dims=None):
    return strings.as_array(elements, (len(elements),) if dims is None else dims)


def test_outputs_land_where_they_are_bound_and_inputs_are_read_in_place(session):
    """No copy of ours: the regions themselves are what ONNX Runtime reads and writes."""
    opened = session(
        "(float[n, 16] x) => (float[n, 16] y, float[n] sum) "
        "{ two = Constant <value = float {2}> ()  one = Constant <value = float {1}> () "
        "axis = Constant <value = int64[1] {1}> () "
        "d = Mul (x, two)  y = Add (d, one)  sum = ReduceSum <keepdims = 0> (x, axis) }"
    )
    signature = Signature(opened.inputs, opened.outputs, 8)
    shape = geometry.shape_of(signature, ((16,),), 8)
    inputs = np.zeros(shape.input_bytes, np.uint8)
    outputs = np.full(shape.output_bytes, 0xAA, np.uint8)
    binding = opened.bind(shape, 3, inputs.ctypes.data, outputs.ctypes.data)
    x = inputs[: 3 * 64].view(np.float32)
    for step in range(3):  # the same binding, new bytes: nothing was captured when it was made
        x[:] = np.arange(48) + step
        opened.run(binding)
        for p in shape.outputs:
            end = p.offset + 3 * p.row_bytes
            got = outputs[p.offset : end].view(np.float32)
            expected = 2 * x + 1 if p.spec.name == "y" else x.reshape(3, 16).sum(1)
            np.testing.assert_array_equal(got, expected)
            assert (outputs[end : p.offset + 8 * p.row_bytes] == 0xAA).all()


def test_outputs_that_are_not_bound_are_copied_out(session):
    opened = session("(float[n] x) => (int64[1, k] y) { y = NonZero (x) }")
    signature = Signature(opened.inputs, opened.outputs, 0)
    shape = geometry.shape_of(signature, ((4,),), 1)
    assert shape.outputs is None
    inputs = np.zeros(shape.input_bytes, np.uint8)
    inputs[:16] = np.array([0, 1, 0, 2], np.float32).view(np.uint8)
    binding = opened.bind(shape, 1, inputs.ctypes.data, 0)
    opened.run(binding)
    (y,) = opened.unbound_outputs(binding)
    np.testing.assert_array_equal(y, [[1, 3]])


def values(name: str) -> np.ndarray:
    """Six elements of a datatype, its extremes among them."""
    dtype = DATATYPES[name].dtype
    if name == "BF16":
        return BF16_LIMITS
    if dtype.kind == "b":
        return np.array([0, 1, 1, 0, 0, 1], dtype)
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        return np.array([0, -1.5, limits.max, limits.tiny, np.inf, np.nan], dtype)
    limits = np.iinfo(dtype)
    return np.array([0, 1, 2, 3, limits.min, limits.max], dtype)


@pytest.mark.parametrize("dims", [(6,), (3, 2), (1, 6, 1), (0,), (2, 0, 3), ()])
@pytest.mark.parametrize("name", [name for name in DATATYPES if name != "BYTES"])
def test_every_datatype_comes_back_bit_for_bit(session, name, dims):
    text = TensorProto.DataType.Name(DATATYPES[name].onnx).lower()
    opened = session(
        f"({text}[] x) => ({text}[] y, int64[] s) {{ y = Identity (x)  s = Shape (x) }}"
    )
    count = int(np.prod(dims))
    x = values(name)[:count].reshape(dims)
    y, s = opened.run_arrays({"x": x})
    assert opened.inputs[0].datatype.name == name
    assert opened.inputs[0].shape is None
    assert (y.dtype, y.shape) == (x.dtype, dims)
    assert y.tobytes() == x.tobytes()
    assert s.tolist() == list(dims)


@pytest.mark.parametrize(
    ("elements", "dims"),
    [
        (ODD, (6,)),
        (ODD, (2, 1, 3)),
        (ODD[:1], ()),
        ([], (0,)),
        ([], (2, 0)),
        (NOT_TEXT, (6,)),
        (NOT_TEXT, (3, 2)),
        (NOT_TEXT[:1], ()),
        (NOT_TEXT[:1], (1, 1)),
    ],
)
def test_strings_of_any_bytes_come_back(session, elements, dims):
    opened = session("(string[] x) => (string[] y) { y = Identity (x) }")
    (y,) = opened.run_arrays({"x": texts(elements, dims)})
    assert y.shape == dims
    assert y.reshape(-1).tolist() == elements


@pytest.mark.parametrize("elements", [ODD, NOT_TEXT])
def test_an_operator_on_strings_sees_their_bytes(session, elements):
    opened = session("(string[n] a, string[n] b) => (string[n] y) { y = StringConcat (a, b) }")
    a, b = texts(elements), texts(elements[::-1])
    (y,) = opened.run_arrays({"a": a, "b": b})
    assert y.tolist() == [one + other for one, other in zip(a, b, strict=True)]


@pytest.mark.parametrize("elements", [ODD, NOT_TEXT])
def test_strings_and_numbers_go_together(session, elements):
    opened = session(
        "(string[n] s, bfloat16[n] b, float[2] f, bool[n] c) => (string[n] t, bfloat16[n] d, float[2] g) "
        "{ t = Where (c, s, s)  d = Identity (b)  g = Neg (f) }"
    )
    t, d, g = opened.run_arrays(
        {
            "s": texts(elements),
            "b": BF16_LIMITS,
            "f": np.array([1, -2], np.float32),
            "c": np.array([1, 0] * 3, np.bool_),
        }
    )
    assert t.tolist() == elements
    assert d.tobytes() == BF16_LIMITS.tobytes()
    assert g.tolist() == [-1, 2]


@pytest.mark.parametrize("elements", [ODD, NOT_TEXT])
def test_bf16_goes_in_beside_strings_where_none_comes_out(session, elements):
    opened = session(
        "(string[n] s, bfloat16[n] b) => (string[n] t, float[n] f) "
        "{ t = Identity (s)  f = Cast <to = 1> (b) }"
    )
    t, f = opened.run_arrays({"s": texts(elements), "b": BF16_LIMITS})
    assert t.tolist() == elements
    np.testing.assert_array_equal(f, BF16_LIMITS.view(ml_dtypes.bfloat16).astype(np.float32))


def test_strings_that_are_not_text_may_come_of_a_model_that_takes_none(session):
    labels = helper.make_tensor("labels", TensorProto.STRING, [3], [b"fine", b"\xff\0\xfe", b""])
    model = parse("(int64[n] i) => (string[n] y) { y = Gather (labels, i) }")
    model.graph.initializer.append(labels)
    (y,) = session(model).run_arrays({"i": np.array([2, 1, 0, 1])})
    assert y.tolist() == [b"", b"\xff\0\xfe", b"fine", b"\xff\0\xfe"]


def test_strings_that_are_not_text_may_come_of_text(session):
    tail = helper.make_tensor("tail", TensorProto.STRING, [1], [b"\xff"])
    model = parse("(string[n] x) => (string[n] y) { y = StringConcat (x, tail) }")
    model.graph.initializer.append(tail)
    (y,) = session(model).run_arrays({"x": texts(ODD)})
    assert y.tolist() == [element + b"\xff" for element in ODD]


def test_optional_inputs_may_lack(session):
    opened = session(
        "(float[n] x, float scale = {3}) => (float[n] y) { y = Mul (x, scale) }"
    )  # fmt: skip
    assert [(spec.name, spec.optional) for spec in opened.inputs] == [("x", False), ("scale", True)]
    x = np.array([1, 2], np.float32)
    assert opened.run_arrays({"x": x})[0].tolist() == [3, 6]
    assert opened.run_arrays({"x": x, "scale": np.array(5, np.float32)})[0].tolist() == [5, 10]


def test_weights_that_an_old_exporter_lists_as_inputs_are_none_of_the_clients(session):
    count = MAX_OPTIONAL_INPUTS + 1
    inputs = ", ".join(f"float w{i} = {{{i}}}" for i in range(count))
    sums = "  ".join(f"s{i + 1} = Add (s{i}, w{i})" for i in range(count))
    opened = session(f"(float s0, {inputs}) => (float s{count}) {{ {sums} }}")
    assert [spec.name for spec in opened.inputs] == ["s0"]
    assert opened.hidden_inputs == count


def test_dims_that_say_nothing_are_unknown(session):
    opened = session("(float[n, 3, ?] x, float[] z) => (float[] y) { y = Mul (x, z) }")
    x, z = opened.inputs
    assert x.shape == ("n", 3, None)
    assert z.shape is None
    assert opened.outputs[0].shape is None
    scalar = session("(float x) => (float y) { y = Neg (x) }")
    assert scalar.inputs[0].shape == ()


def test_a_sequence_output_is_refused(session):
    with pytest.raises(LoadError, match="only tensors are served"):
        session("(float[n] x) => (seq(float[n]) y) { y = SequenceConstruct (x) }")


def test_more_dims_than_a_record_holds_are_refused(session):
    dims = ", ".join("1" * 9)
    with pytest.raises(LoadError, match="input 'x' has 9 dims, of 8 at most"):
        session(f"(float[{dims}] x) => (float[{dims}] y) {{ y = Neg (x) }}")


@pytest.mark.parametrize("device", ["cuda:0", "CUDAExecutionProvider"])
def test_a_device_that_is_not_there_is_a_load_error(session, device):
    with pytest.raises(LoadError, match="CUDAExecutionProvider"):
        session("(float[n] x) => (float[n] y) { y = Neg (x) }", Execution(device))


@pytest.mark.parametrize("level", ["all", "extended", "basic", "disabled"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_every_way_of_execution_gives_the_same(session, level, mode):
    execution = Execution(
        threads=2,
        inter_op_threads=2,
        execution_mode=mode,
        graph_optimization=level,
        memory_pattern=mode == "sequential",
        cpu_arena=False,
        config=(("session.disable_prepacking", "1"),),
    )
    opened = session("(float[n] x) => (float[n] y) { a = Neg (x)  y = Abs (a) }", execution)
    assert opened.run_arrays({"x": np.array([1, -2], np.float32)})[0].tolist() == [1, 2]


def test_an_option_that_the_runtime_does_not_take_is_a_load_error(session):
    execution = Execution(
        provider_options=(("no_such_option", "1"),), device="CPUExecutionProvider"
    )
    opened = session("(float[n] x) => (float[n] y) { y = Neg (x) }", execution)
    assert opened.inputs[0].name == "x"  # the CPU's provider reads none
    with pytest.raises(LoadError, match="refused the model"):
        session(
            "(float[n] x) => (float[n] y) { y = Neg (x) }", Execution(config=(("x" * 5000, "1"),))
        )


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((2, 3), np.float32)},
        {"x": np.zeros(4, np.float32)},
        {},
        {"x": texts([b"a", b"b"])},
        {"x": texts([b"\xff", b"b"])},
    ],
    ids=["dims", "rank", "missing", "text", "bytes"],
)
def test_what_the_graph_does_not_take_is_a_run_error(session, arrays):
    opened = session("(float[n, 4] x) => (float[n, 4] y) { y = Neg (x) }")
    with pytest.raises(RunError) as caught:
        opened.run_arrays(arrays)
    assert caught.value.public.startswith("ONNX Runtime failed (")


@pytest.mark.parametrize("elements", [[b"12", b"secret"], [b"12", b"\xff"]])
def test_a_model_that_fails_on_strings_does_not_quote_them(session, elements):
    opened = session("(string[n] x) => (float[n] y) { y = Cast <to = 1> (x) }")
    with pytest.raises(RunError) as caught:
        opened.run_arrays({"x": texts(elements)})
    assert "secret" not in caught.value.public
    assert opened.run_arrays({"x": texts([b"12", b"-1.5"])})[0].tolist() == [12, -1.5]


def test_what_the_runtime_says_of_values_and_paths_stays_inside():
    error = RunError.from_runtime(
        RuntimeError(
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while "
            "running Gather node. Name:'g' Status Message: idx=4242 out of bounds in /secret/m.onnx"
        )
    )
    assert error.public == "ONNX Runtime failed (INVALID_ARGUMENT) in a Gather node"
    assert "4242" in str(error)


def test_telemetry_is_off_before_the_runtime_is_imported():
    code = (
        "import os, sys\n"
        "class Spy:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime':\n"
        "            print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Spy())\n"
        "import gateway.serving.session\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1"]
