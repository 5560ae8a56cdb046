"""Models whose tensors lie about their size, or name files that are not the model's to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.zoo.hostile_files import RUNTIME, Hostile, changed

TENSOR = r"^tensor 'w' "
"""How a reason begins that is a tensor's fault."""

Change = Callable[[TensorProto], object]


def hostile() -> list[Hostile]:
    """All of this module."""
    return [*_sizes(), *_places(), *_elsewhere()]


def _of_weight(change: Change) -> Callable[[onnx.ModelProto], object]:
    return lambda model: change(model.graph.initializer[0])


def _sizes() -> list[Hostile]:
    """Inline data that do not fit the dims."""

    def dims(*values: int) -> Change:
        def change(tensor: TensorProto) -> None:
            tensor.dims[:] = values

        return change

    def typed_data_too_short(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.float_data.extend([1.0] * 11)

    def no_data(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")

    def data(count: int) -> Change:
        return lambda tensor: setattr(tensor, "raw_data", bytes(count))

    def datatype(number: int) -> Change:
        return lambda tensor: setattr(tensor, "data_type", number)

    cases = {
        "data_too_short": (data(44), f"{TENSOR}.*44 bytes"),
        "data_too_long": (data(4096), f"{TENSOR}.*4096 bytes"),
        "data_missing": (no_data, f"{TENSOR}|{RUNTIME}"),
        "data_of_a_type_too_short": (typed_data_too_short, f"{TENSOR}|{RUNTIME}"),
        "dims_overflow": (dims(2**40, 2**40), f"{TENSOR}.*too large"),
        "dims_overflow_beside_zero": (dims(2**40, 2**40, 0), f"{TENSOR}.*too large"),
        "dims_wrap_to_the_right_size": (dims(2**62, 48, 1), f"{TENSOR}.*too large"),
        "dims_negative": (dims(-4, -3), f"{TENSOR}.*negative"),
        "dims_lowest": (dims(-(2**63), 1), f"{TENSOR}.*negative"),
        "datatype_unknown": (datatype(999), f"{TENSOR}|{RUNTIME}"),
        "datatype_undefined": (datatype(0), f"{TENSOR}|{RUNTIME}"),
    }
    return [
        Hostile(name, changed(_of_weight(change)), reason)
        for name, (change, reason) in cases.items()
    ]


def _external(tensor: TensorProto, **entries: str) -> None:
    """Make a tensor's data external, with exactly these entries."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _places() -> list[Hostile]:
    """External data by one tensor of the main graph; weights.bin holds what it asks for."""

    def case(name: str, reason: str, prepare=None, **entries: str) -> Hostile:
        change = changed(_of_weight(lambda tensor: _external(tensor, **entries)))

        def write(folder: Path) -> None:
            (folder / "weights.bin").write_bytes(bytes(48))
            (folder.parent / "outside.bin").write_bytes(bytes(48))
            if prepare is not None:
                prepare(folder)
            change(folder)

        return Hostile(f"external_{name}", write, f"{TENSOR}.*{reason}")

    def middle_link(folder: Path) -> None:
        (folder / "parts").symlink_to("..")

    memory = "*/_ORT_MEM_ADDR_/*"
    return [
        case("parent", r"'\.\.'", location="../outside.bin"),
        case("parent_inside", r"'\.\.'", location="parts/../../outside.bin"),
        case("absolute", "absolute", location="/etc/hostname"),
        case("process", "absolute", location="/proc/self/environ"),
        case(
            "link",
            "link",
            lambda folder: (folder / "linked.bin").symlink_to("/etc/hostname"),
            location="linked.bin",
        ),
        case("link_in_the_middle", "link", middle_link, location="parts/outside.bin"),
        case("missing_file", "not there", location="absent.bin"),
        case("folder", "not a regular file", location="."),
        case(
            "pipe",
            "not a regular file",
            lambda folder: os.mkfifo(folder / "pipe.bin"),
            location="pipe.bin",
        ),
        case("no_location", "missing or empty", offset="0", length="48"),
        case("empty_location", "missing or empty", location=""),
        case("nul_in_location", "NUL", location="weights.bin\0/etc/hostname"),
        case("backslash", "backslash", location="..\\outside.bin"),
        case("memory", "memory", location=memory, offset="4096", length="48"),
        case("memory_like", "memory", location="*/weights.bin", offset="0", length="48"),
        case("offset_past_end", "byte 4144", location="weights.bin", offset="4096", length="48"),
        case("offset_negative", "offset", location="weights.bin", offset="-48", length="48"),
        case("offset_overflows", "offset", location="weights.bin", offset=str(2**64 - 24)),
        case("offset_no_number", "offset", location="weights.bin", offset="0x10"),
        case("too_short", "bytes", location="weights.bin", offset="0", length="8"),
        case("too_long", "bytes", location="weights.bin", offset="0", length="4096"),
    ]


def _elsewhere() -> list[Hostile]:
    """External data that are not the main graph's initializers."""
    outside = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], bytes(48), raw=True)
    _external(outside, location="../outside.bin")

    def in_attribute(model: onnx.ModelProto) -> None:
        del model.graph.initializer[:]
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=outside))

    def in_branch(model: onnx.ModelProto) -> None:
        branch = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["z"])],
            "branch",
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
            [outside],
        )
        always = helper.make_tensor("always", TensorProto.BOOL, [], [True])
        model.graph.initializer[0].CopyFrom(always)
        choice = helper.make_node("If", ["always"], ["y"], then_branch=branch, else_branch=branch)
        model.graph.node[0].CopyFrom(choice)

    def in_function(model: onnx.ModelProto) -> None:
        opset = [helper.make_opsetid("", 21)]
        nodes = [
            helper.make_node("Constant", [], ["w"], value=outside),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        model.functions.append(helper.make_function("own", "Product", ["x"], ["y"], nodes, opset))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[0].CopyFrom(helper.make_node("Product", ["x"], ["y"], domain="own"))
        del model.graph.initializer[:]

    changes = {"attribute": in_attribute, "branch": in_branch, "function": in_function}
    return [
        Hostile(f"external_parent_in_{name}", changed(change), rf"{TENSOR}.*'\.\.'")
        for name, change in changes.items()
    ]
