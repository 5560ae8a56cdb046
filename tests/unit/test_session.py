"""Sessions: what is bound where, what is refused at load, and that nobody phones home."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gateway.errors import LoadError
from gateway.serving import geometry
from gateway.serving.session import Device, ModelSession, RunError

CPU = Device.parse("cpu")


def save(path, nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def value(name, shape, element=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, element, shape)


@pytest.fixture
def multi(tmp_path, benchmark_models):
    benchmark_models.multi(tmp_path / "model.onnx")
    return ModelSession(tmp_path / "model.onnx", CPU, 1, 16)


def test_outputs_land_where_they_are_bound_and_inputs_are_read_in_place(tmp_path, benchmark_models):
    """No copy of ours: the regions themselves are what ONNX Runtime reads and writes."""
    benchmark_models.echo(tmp_path / "model.onnx")
    session = ModelSession(tmp_path / "model.onnx", CPU, 1, None)
    shape = geometry.shape_of(session.signature, ((16,),), 8)
    inputs = np.zeros(shape.input_bytes, np.uint8)
    outputs = np.full(shape.output_bytes, 0xAA, np.uint8)
    binding = session.bind(shape, 3, inputs.ctypes.data, outputs.ctypes.data)
    x = inputs[: 3 * 64].view(np.float32)
    for step in range(3):  # the same binding, new bytes: nothing was captured when it was made
        x[:] = np.arange(48) + step
        session.run(binding)
        for placement in shape.outputs:
            end = placement.offset + 3 * placement.row_bytes
            got = outputs[placement.offset : end].view(np.float32)
            expected = 2 * x + 1 if placement.spec.name == "y" else x.reshape(3, 16).sum(1)
            np.testing.assert_array_equal(got, expected)
            assert (outputs[end : placement.offset + 8 * placement.row_bytes] == 0xAA).all()


def test_the_signature_names_every_datatype(multi):
    assert {t.datatype.name for t in multi.signature.inputs} >= {"FP32", "INT64", "UINT8", "BOOL"}
    assert multi.signature.max_batch_size == 16


@pytest.mark.parametrize(
    ("shape", "element", "reason"),
    [
        ([1, 4], TensorProto.FLOAT, "first dim must be the batch"),
        ([], TensorProto.FLOAT, "first dim must be the batch"),
        (["n", 4], TensorProto.STRING, "holds strings"),
    ],
)
def test_what_is_not_served_is_refused_with_its_reason(tmp_path, shape, element, reason):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", shape, element)],
        [value("y", shape, element)],
    )
    with pytest.raises(LoadError, match=reason):
        ModelSession(path, CPU, 1, None)


def test_without_one_symbolic_batch_dim_max_batch_size_decides(tmp_path):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", ["n", 4])],
        [value("y", ["other", 4])],
    )
    with pytest.raises(LoadError, match="set max_batch_size"):
        ModelSession(path, CPU, 1, None)
    assert ModelSession(path, CPU, 1, 8).signature.max_batch_size == 8


def test_a_sequence_output_is_refused(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, ["n"])
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [value("x", ["n"])],
        [sequence],
    )
    with pytest.raises(LoadError, match="only tensors are served"):
        ModelSession(path, CPU, 1, None)


def test_a_device_that_is_not_there_is_a_load_error(tmp_path, benchmark_models):
    benchmark_models.echo(tmp_path / "model.onnx")
    with pytest.raises(LoadError, match="CUDAExecutionProvider"):
        ModelSession(tmp_path / "model.onnx", Device.parse("cuda:0"), 1, None)


def test_a_failing_warm_up_fails_the_load(tmp_path):
    """Reshape to seven columns fails for rows of four."""
    seven = helper.make_tensor("seven", TensorProto.INT64, [2], [-1, 7])
    path = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("Constant", [], ["shape"], value=seven),
            helper.make_node("Reshape", ["x", "shape"], ["y"]),
        ],
        [value("x", ["n", 4])],
        [value("y", ["n", 7])],
    )
    session = ModelSession(path, CPU, 1, None)
    with pytest.raises(LoadError, match="warm-up"):
        session.warm_up()


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


def write_mixing(path, kind):
    """Graphs whose rows depend on their mates though their first dims are one symbol."""
    if kind == "mean over the batch":
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ]
        return save(path, nodes, [value("x", ["n", 4])], [value("y", ["n", 4])])
    if kind == "mean, another dim variable":
        nodes = [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ]
        return save(path, nodes, [value("x", ["n", "k"])], [value("y", ["n", "k"])])
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    return save(path, nodes, [value("x", ["n", 4])], [value("y", ["n", "n"])])


@pytest.mark.parametrize("kind", ["mean over the batch", "mean, another dim variable"])
def test_rows_that_depend_on_their_mates_are_not_batched_by_default(tmp_path, kind):
    path = write_mixing(tmp_path / "m.onnx", kind)
    with pytest.raises(LoadError, match="depend on the other rows"):
        ModelSession(path, CPU, 1, None).check_rows_are_independent()
    ModelSession(path, CPU, 1, 8).check_rows_are_independent()  # a setting said that it is fine


def test_a_batch_dim_within_a_row_is_refused(tmp_path):
    path = write_mixing(tmp_path / "m.onnx", "products of rows")
    with pytest.raises(LoadError, match="the batch dim 'n' inside"):
        ModelSession(path, CPU, 1, 8)


def test_independent_rows_pass(tmp_path, benchmark_models):
    for name in ("echo", "mlp784", "gather", "multi", "dynamic"):
        benchmark_models.MODELS[name][0](tmp_path / f"{name}.onnx")
        ModelSession(tmp_path / f"{name}.onnx", CPU, 1, None).check_rows_are_independent()


def test_a_bf16_model_is_warmed_up(tmp_path):
    bf16 = TensorProto.BFLOAT16
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", ["n", 4], bf16)],
        [value("y", ["n", 4], bf16)],
    )
    session = ModelSession(path, CPU, 1, None)
    session.check_rows_are_independent()
    assert session.warm_up()
