"""Models whose graphs are wrong, cannot be served, or run for ever, too deep or too large."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from tests.zoo.building import MODEL_FILE, Write, parse, writer
from tests.zoo.hostile_files import RUNTIME, Hostile, changed

FLOAT_ROWS = "(float[n, 4] x) => (float[n, 4] y)"

DIES = r"the worker .* while loading it"
"""The reason for a model that ends its process."""


def hostile() -> list[Hostile]:
    """All of this module."""
    return [*_versions(), *_wiring(), *_unservable(), *_at_warm_up(), *_too_much()]


def _versions() -> list[Hostile]:
    """Of operators and formats that do not exist."""
    return [
        Hostile("opset_9999", writer(f"{FLOAT_ROWS} {{ y = Relu (x) }}", opset=9999), RUNTIME),
        Hostile("ir_version_9999", changed(lambda m: setattr(m, "ir_version", 9999)), RUNTIME),
        Hostile("no_opset", changed(lambda model: model.ClearField("opset_import")), RUNTIME),
        Hostile("unknown_operator", writer(f"{FLOAT_ROWS} {{ y = Frobnicate (x) }}"), RUNTIME),
        Hostile(
            "unknown_domain",
            writer(f"{FLOAT_ROWS} {{ y = some.domain.Relu (x) }}"),
            RUNTIME,
        ),
        Hostile("unknown_attribute", writer(f"{FLOAT_ROWS} {{ y = Relu <no = 1> (x) }}"), RUNTIME),
    ]


def _wiring() -> list[Hostile]:
    """Nodes that do not fit each other."""
    texts = {
        "wrong_datatype": f"{FLOAT_ROWS} {{ a = Cast <to = 7> (x)  y = Add (a, x) }}",
        "wrong_output_datatype": "(float[n] x) => (int64[n] y) { y = Neg (x) }",
        "cycle": f"{FLOAT_ROWS} {{ a = Add (x, b)  b = Neg (a)  y = Neg (b) }}",
        "feeds_itself": f"{FLOAT_ROWS} {{ y = Add (x, y) }}",
        "missing_edge": f"{FLOAT_ROWS} {{ y = Add (x, nowhere) }}",
        "missing_output": f"{FLOAT_ROWS} {{ z = Neg (x) }}",
        "duplicate_names": f"{FLOAT_ROWS} {{ a = Neg (x)  a = Abs (x)  y = Neg (a) }}",
        "overwrites_its_input": f"{FLOAT_ROWS} {{ x = Neg (x)  y = Neg (x) }}",
        "too_few_inputs": f"{FLOAT_ROWS} {{ y = Add (x) }}",
        "misfit_of_matmul": (
            "(float[n, 4] x, float[5, 3] w) => (float[n, 3] y) { y = MatMul (x, w) }"
        ),
    }

    def twice_the_input(model: onnx.ModelProto) -> None:
        model.graph.input.append(model.graph.input[0])

    return [
        *(Hostile(name, writer(text), RUNTIME) for name, text in texts.items()),
        Hostile("duplicate_inputs", changed(twice_the_input), RUNTIME),
        Hostile("calls_itself", _recursive("F", "F"), f"{RUNTIME}|{DIES}"),
        Hostile(
            "calls_itself_by_another",
            _recursive("F", "G"),
            f"{RUNTIME}|{DIES}",
        ),
    ]


def _recursive(first: str, second: str) -> Write:
    """Local functions that call each other, or one that calls itself."""

    def change(model: onnx.ModelProto) -> None:
        del model.graph.initializer[:]
        for name, called in {first: second, second: first}.items():
            body = [helper.make_node(called, ["x"], ["y"], domain="own")]
            opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
            model.functions.append(helper.make_function("own", name, ["x"], ["y"], body, opsets))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[0].CopyFrom(helper.make_node(first, ["x"], ["y"], domain="own"))

    return changed(change)


def _unservable() -> list[Hostile]:
    """ONNX Runtime takes them, but no protocol has a form for their tensors; or settings contradict."""
    ranks = ", ".join("abcdefghi")
    texts = {
        "sequence_output": (
            "(float[n] x) => (seq(float[n]) y) { y = SequenceConstruct (x, x) }",
            "output 'y'",
        ),
        "sequence_input": (
            "(seq(float[n]) x) => (float[m] y) { y = ConcatFromSequence <axis = 0> (x) }",
            "input 'x'",
        ),
        "optional_typed_input": (
            "(optional(float[n]) x) => (float[n] y) { y = OptionalGetElement (x) }",
            "input 'x'",
        ),
        "fp8_input": ("(float8e4m3fn[n] x) => (float[n] y) { y = Cast <to = 1> (x) }", "input 'x'"),
        "int4_input": ("(int4[n] x) => (int8[n] y) { y = Cast <to = 3> (x) }", "input 'x'"),
        "int4_output": ("(int8[n] x) => (int4[n] y) { y = Cast <to = 22> (x) }", "output 'y'"),
        "rank_9": (
            f"(float[{ranks}] x) => (float[{ranks}] y) {{ y = Neg (x) }}",
            "input 'x'.*dims",
        ),
        "no_outputs": ("(float[n] x) => () { y = Neg (x) }", f"(?i){RUNTIME}|outputs"),
    }
    zip_map = (
        '<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 1]> graph '
        "(float[n, 2] x) => (seq(map(int64, float)) y) "
        "{ y = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (x) }"
    )
    return [
        *(Hostile(name, writer(text), reason) for name, (text, reason) in texts.items()),
        Hostile(
            "map_output",
            lambda folder: onnx.save(onnx.parser.parse_model(zip_map), folder / MODEL_FILE),
            "output 'y'",
        ),
        Hostile(
            "batched_against_its_graph",
            writer("(float[1, 4] x) => (float[1, 4] y) { y = Neg (x) }"),
            "first dim|max_batch_size",
            config="max_batch_size: 8\n",
        ),
        Hostile(
            "batched_without_a_dim",
            writer("(float x) => (float y) { y = Neg (x) }"),
            "first dim|max_batch_size",
            config="max_batch_size: 8\n",
        ),
    ]


def _at_warm_up() -> list[Hostile]:
    """What only a run shows, whatever the input.

    The lowest whole number divided by -1 has no result that fits; the processor ends the process. Outputs
    are huge beyond any address space, so that they fail whatever the system promises to allocate.
    """
    texts = {
        "huge_output": (
            "(float[4] x) => (float[k] y) <int64[1] factor = {8796093022208}> "
            f"{{ {_ZERO}  shape = Shape (x)  count = Mul (shape, factor)  "
            "both = Add (count, zero)  y = ConstantOfShape (both) }"
        ),
        "huge_constant": (
            "(float[1] x) => (float[k] y) <int64[1] count = {35184372088832}> "
            "{ a = ConstantOfShape (count)  y = Add (a, x) }"
        ),
        "whole_division_by_zero": (
            f"(float[2] x) => (int64[k] y) {{ {_ZERO}  y = Div (zero, zero) }}"
        ),
        "misfit_at_run_time": (
            "(float[4] x) => (float[k] y) <int64[1] three = {3}> "
            f"{{ {_ZERO}  shape = Add (three, zero)  y = Reshape (x, shape) }}"
        ),
        "index_outside_its_table": (
            "(float[2] x) => (float[k] y) <float[2] table = {1, 2}, int64 much = {1000000}> "
            f"{{ {_ZERO}  far = Add (zero, much)  y = Gather (table, far) }}"
        ),
    }
    endless = (
        "(float[2] x) => (float[2] y) <bool true = {1}> { y = Loop (, true, x) <"
        "body = step (int64 i, bool on, float[2] had) => (bool more, float[2] now) "
        "{ more = Identity (true)  now = Neg (had) }> }"
    )
    lowest = "<int64[1] lowest = {-9223372036854775808}, int64 minus = {-1}>"
    crash = (
        f"(float[2] x) => (int64[k] y) {lowest} {{ {_ZERO}  a = Add (zero, lowest)  "
        "y = Div (a, minus) }"
    )
    crash_of_constants = (
        f"(float[2] x) => (int64[k] y) {lowest} {{ {_ZERO}  a = Div (lowest, minus)  "
        "y = Add (a, zero) }"
    )
    return [
        *(Hostile(name, writer(text), "warm-up") for name, text in texts.items()),
        Hostile("endless_loop", writer(endless), "load_timeout_s", is_endless=True),
        Hostile("crash", writer(crash), DIES),
        Hostile("crash_of_constants", writer(crash_of_constants), DIES),
    ]


_ZERO = (
    "none = Sub (x, x)  sum = ReduceSum <keepdims = 0> (none)  "
    "whole = Cast <to = 7> (sum)  minus_one = Constant <value = int64[1] {-1}> ()  "
    "zero = Reshape (whole, minus_one)"
)
"""Makes a zero, int64[1], of any finite x, which no optimisation can know."""


DEEP = 200
"""Branches inside each other."""

MANY_INPUTS = 10_000


def _too_much() -> list[Hostile]:
    names = [f"input_{i}" for i in range(MANY_INPUTS)]
    inputs = ", ".join(f"float[n, 1] {name}" for name in names)
    many = f"({inputs}) => (float[n, m] y) {{ y = Concat <axis = 1> ({', '.join(names)}) }}"

    def odd_names(folder: Path) -> None:
        model = parse("(float[n] x) => (seq(float[n]) y) { y = SequenceConstruct (x, x) }")
        model.graph.output[0].name = model.graph.node[0].output[0] = "y\n\x1b[31m/etc/passwd"
        onnx.save(model, folder / MODEL_FILE)

    def long_name(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = model.graph.node[0].input[0] = "x" * 1_000_000

    return [
        Hostile("deep_branches", _deep_branches, f"(?i)nested|deep|not an ONNX model|{RUNTIME}"),
        Hostile("many_inputs", writer(many), "(?i)inputs|long"),
        Hostile("odd_name_of_what_is_refused", odd_names, "only tensors are served"),
        Hostile("long_name", changed(long_name), "(?i)name|long"),
    ]


def _deep_branches(folder: Path) -> None:
    """An If in an If in an If; put together as bytes, since protobuf itself refuses such depth."""
    model = parse(
        "(bool x) => (float[2] y) { y = If (x) <"
        "then_branch = a () => (float[2] z) { z = Constant <value = float[2] {1, 2}> () }, "
        "else_branch = b () => (float[2] z) { z = Constant <value = float[2] {3, 4}> () }> }"
    )
    node = model.graph.node[0]
    (output,) = node.attribute[0].g.output
    inner = node.attribute[0].g.SerializeToString()
    other = _field(_NODE_ATTRIBUTE, node.attribute[1].SerializeToString())
    for _ in range(DEEP):
        choice = _field(1, b"x") + _field(2, b"z") + _field(4, b"If") + _then(inner) + other
        inner = _field(1, choice) + _field(2, b"deeper") + _field(12, output.SerializeToString())
    del node.attribute[0]
    outermost = _field(1, node.SerializeToString() + _then(inner))
    model.graph.ClearField("node")
    graph = model.graph.SerializeToString() + outermost
    model.ClearField("graph")
    (folder / MODEL_FILE).write_bytes(model.SerializeToString() + _field(7, graph))


def _then(graph: bytes) -> bytes:
    """An attribute of a node: the graph of an If's first branch."""
    is_graph = _varint(20 << 3) + b"\x05"
    return _field(_NODE_ATTRIBUTE, _field(1, b"then_branch") + _field(6, graph) + is_graph)


_NODE_ATTRIBUTE = 5
"""The number of NodeProto.attribute."""


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of protobuf's wire format."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    pieces = []
    while value >= 0x80:
        pieces.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*pieces, value])
