"""Model files are read before ONNX Runtime opens them: right about good ones, and no bad one gets by."""

from __future__ import annotations

import os
import time

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gateway.errors import LoadError
from gateway.serving import onnxfile, onnxtensors
from gateway.serving.onnxfile import MAX_FILE_BYTES, MAX_GRAPH_DEPTH, examine

from . import onnxfiles
from .onnxfiles import (
    PLACES,
    conditional,
    defaults_of,
    external,
    function,
    locations_of,
    model,
    ops_of,
    opsets_of,
    sparse,
    subgraph,
    tensor,
    tensors_of,
    unranked_of,
    value,
)

WEIGHT_BYTES = 24
SECRET = "s3cret/§"  # matches no grammar of ours: no public message may hold it

fuzz = settings(
    deadline=None,  # a busy machine is no failure
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its own file
)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a file of weights, and one outside it."""
    made = tmp_path / "1"
    made.mkdir()
    (made / "w.bin").write_bytes(onnxfiles.VALUES.tobytes())
    (tmp_path / "outside.bin").write_bytes(bytes(WEIGHT_BYTES))
    return made


def save(folder, content):
    path = folder / "model.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def refusal(folder, content):
    with pytest.raises(LoadError) as caught:
        examine(save(folder, content))
    message = caught.value.message
    assert str(folder) not in message
    assert SECRET not in message
    assert "\n" not in caught.value.detail
    return message


def holding(made):
    return model(initializers=[made])


def assert_true_of(facts, whole):
    """The facts are what onnx's own parser finds."""
    assert facts.ops - {""} == ops_of(whole)
    assert facts.opsets == opsets_of(whole)
    assert facts.ir_version == whole.ir_version
    assert facts.unranked == unranked_of(whole)
    assert facts.initializers_as_inputs == defaults_of(whole)


# What is said of good files


def many_kinds():
    """A model with a bit of everything that the reader walks through."""
    twice = function(helper.make_node("Add", ["a", "a"], ["b"]))
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="first"),
        helper.make_node("Twice", ["r"], ["t"], domain="local"),
        helper.make_node("Scaler", ["t"], ["s"], domain="ai.onnx.ml", scale=[1.0], offset=[0.0]),
        helper.make_node("Sub", ["s", "w"], ["q"], domain="ai.onnx"),
        conditional(
            subgraph(external(), nodes=[helper.make_node("Neg", ["q"], ["inner_y"])]),
            subgraph(
                nodes=[conditional(subgraph(nodes=[onnx.NodeProto(op_type="Abs")]), subgraph())]
            ),
        ),
        helper.make_node("Constant", [], ["k"], value=tensor("k", np.int64(3))),
        helper.make_node("Constant", [], ["l"], sparse_value=sparse(tensor("l", np.zeros(6)))),
    ]
    whole = model(
        nodes,
        inputs=[value("x", ["N", 3]), value("w", [2, 3]), value("u", None), value("scalar", [])],
        outputs=[
            value("y", None),
            helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None),
            onnx.ValueInfoProto(name="untyped"),
        ],
        initializers=[
            tensor("w"),
            tensor("b", np.float16([1, 2])),
            external("e", offset=12, dims=[3]),
        ],
        functions=[twice],
        opset_imports=[
            helper.make_opsetid("ai.onnx", 17),
            helper.make_opsetid("ai.onnx.ml", 3),
            helper.make_opsetid("local", 1),
        ],
    )
    whole.graph.sparse_initializer.append(sparse(tensor("scalar", np.zeros(6, np.float32))))
    return whole


def test_the_facts_of_a_model_with_everything(folder):
    whole = many_kinds()
    path = save(folder, whole)
    facts = examine(path)
    assert_true_of(facts, whole)
    assert facts.ops == {
        "Relu", "local::Twice", "ai.onnx.ml::Scaler", "Sub", "If", "Neg", "Abs", "Constant", "Add",
    }  # fmt: skip
    assert facts.opsets == {"": 17, "ai.onnx.ml": 3, "local": 1}
    assert facts.ir_version == 9
    assert facts.unranked == {"u", "y"}
    assert facts.initializers_as_inputs == {"w", "scalar"}
    assert facts.file_bytes == path.stat().st_size
    assert facts.external_files == ((folder / "w.bin").resolve(),)
    assert facts.external_bytes == WEIGHT_BYTES


@pytest.mark.parametrize("name", ["mlp16", "encoder", "gather", "dynamic", "multi", "slow"])
def test_the_facts_of_the_benchmark_models(make_repository, name):
    path = make_repository(name) / name / "1" / "model.onnx"
    assert_true_of(examine(path), onnx.load(path))


def test_what_training_runs_is_no_operator_of_the_model(folder):
    facts = examine(save(folder, PLACES["training"](tensor())))
    assert facts.ops == {"Relu"}


def test_external_files_are_counted_once_by_whatever_name(folder):
    (folder / "more").mkdir()
    (folder / "more" / "v.bin").write_bytes(bytes(100))
    (folder / "link.bin").symlink_to("w.bin")
    (folder / "dir").symlink_to("more")
    names = ["w.bin", "./w.bin", "link.bin", "more/v.bin", "dir/v.bin", "dir//./v.bin"]
    facts = examine(
        save(folder, model(initializers=[external(f"t{i}", n) for i, n in enumerate(names)]))
    )
    assert facts.external_files == (folder / "w.bin", folder / "more" / "v.bin")
    assert facts.external_bytes == WEIGHT_BYTES + 100


def test_a_model_in_a_linked_folder_keeps_its_weights_there(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    save(folder, holding(external()))
    assert examine(tmp_path / "latest" / "model.onnx").external_files == (folder / "w.bin",)


def test_the_weights_of_a_linked_model_file_lie_beside_the_link(folder, tmp_path):
    """ONNX Runtime looks for them there, too."""
    save(folder, holding(external()))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "model.onnx").symlink_to(folder / "model.onnx")
    with pytest.raises(LoadError, match="is not there"):
        examine(tmp_path / "2" / "model.onnx")


def test_hard_links_are_taken(folder, tmp_path):
    os.link(tmp_path / "outside.bin", folder / "hard.bin")
    assert (
        examine(save(folder, holding(external(location="hard.bin")))).external_bytes == WEIGHT_BYTES
    )


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
@pytest.mark.parametrize(
    "element", [k for k in TensorProto.DataType.values() if k not in (0, TensorProto.STRING)]
)
def test_every_element_type_has_the_size_that_onnx_gives_it(folder, element, count):
    """Of types that are not known here, anything is taken."""
    if element not in onnxtensors._BITS:
        assert element > max(onnxtensors._BITS)
        return
    made = helper.make_tensor("w", element, [count], [1] * count)
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(made), "w")
    assert raw.data_type == element
    examine(save(folder, holding(raw)))
    raw.raw_data += b"\0"
    assert "bytes of data where its dims ask for" in refusal(folder, holding(raw))


# External data that is refused, wherever it is


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_it_is(folder, place):
    build = PLACES[place]
    good = build(external(dims=[6]))
    facts = examine(save(folder, good))
    assert facts.external_files == (folder / "w.bin",)
    assert_true_of(facts, good)
    reason = refusal(folder, build(external(location="../outside.bin", dims=[6])))
    assert reason.startswith("tensor 'w' has external data whose location has a '..' in it")


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        (None, "is missing or empty"),
        ("", "is missing or empty"),
        ("../outside.bin", "has a '..' in it"),
        ("more/../w.bin", "has a '..' in it"),
        ("..", "has a '..' in it"),
        ("w.bin/..", "has a '..' in it"),
        ("/etc/passwd", "is absolute"),
        ("//w.bin", "is absolute"),
        ("..\\outside.bin", "has a backslash"),
        ("C:\\w.bin", "has a backslash"),
        ("w.bin\0.txt", "has a NUL byte"),
        ("*/_ORT_MEM_ADDR_/*", "stands for memory"),
        ("*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*", "stands for memory"),
        ("*/w.bin", "stands for memory"),
        ("a" * 5000, "has more than 4095 bytes"),
        ("a" * 1000, "is not there"),
        (SECRET, "is not there"),
        ("w.bin/more", "is not there"),
        ("loop", "is not there"),
        ("dangling", "is not there"),
        (".", "is not a regular file"),
        ("more", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("out.bin", "leaves the model's folder by a link"),
        ("up/outside.bin", "leaves the model's folder by a link"),
        ("there/and/w.bin", "leaves the model's folder by a link"),
        ("sibling/w.bin", "leaves the model's folder by a link"),
        ("device", "leaves the model's folder by a link"),
    ],
)
def test_locations_that_name_no_file_of_the_model(folder, tmp_path, location, reason):
    (folder / "more").mkdir()
    os.mkfifo(folder / "pipe")
    (tmp_path / "10").mkdir()  # begins with the folder's own name
    (tmp_path / "10" / "w.bin").write_bytes(bytes(WEIGHT_BYTES))
    (tmp_path / "and").mkdir()
    (tmp_path / "and" / "w.bin").write_bytes(bytes(WEIGHT_BYTES))
    for link, target in {
        "loop": "loop", "dangling": "nothing", "out.bin": "../outside.bin", "up": "..",
        "there": tmp_path, "sibling": "../10", "device": "/dev/zero",
    }.items():  # fmt: skip
        (folder / link).symlink_to(target)
    message = refusal(folder, holding(external(location=location)))
    assert message == (
        f"tensor 'w' has external data whose location {reason}: it must name a file in the model's folder"
    )


def test_the_operator_reads_the_location_and_the_name_escaped(folder):
    with pytest.raises(LoadError) as caught:
        examine(save(folder, holding(external("a\nb", SECRET + "\n\x1b[0m"))))
    assert caught.value.message.startswith("a tensor has")
    assert r"'a\nb'" in caught.value.detail
    assert r"'s3cret/\xa7\n\x1b[0m'" in caught.value.detail


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": -1}, "whose offset is not a decimal number below 2^63"),
        ({"offset": "+1"}, "whose offset is not"),
        ({"offset": " 1"}, "whose offset is not"),
        ({"offset": "0x1"}, "whose offset is not"),
        ({"offset": "1_0"}, "whose offset is not"),
        ({"offset": "٣"}, "whose offset is not"),
        ({"offset": ""}, "whose offset is not"),
        ({"offset": "1.0"}, "whose offset is not"),
        ({"offset": 2**63}, "whose offset is not"),
        ({"offset": 2**64}, "whose offset is not"),
        ({"offset": "9" * 5000}, "whose offset is not"),
        ({"length": -24}, "whose length is not"),
        ({"length": 2**64 + 24}, "whose length is not"),
        ({"offset": 2**63 - 1, "length": 24}, "of a file of 24 bytes"),
        ({"offset": 1, "length": 24}, "up to byte 25 of a file of 24 bytes"),
        ({"offset": 1}, "up to byte 25 of a file of 24 bytes"),
        ({"offset": 25}, "of a file of 24 bytes"),
        ({"length": 23}, "has 23 bytes of external data where its dims ask for 24"),
        ({"length": 0}, "has 0 bytes of external data where its dims ask for 24"),
        ({"prepacked_0": "a|0;99;0"}, "is not location, offset, length or checksum"),
        ({"basepath": "/etc"}, "is not location, offset, length or checksum"),
        ({"": "x"}, "is not location, offset, length or checksum"),
    ],
)
def test_ranges_outside_the_file(folder, entries, reason):
    assert reason in refusal(folder, holding(external(**entries)))


@pytest.mark.parametrize(
    "made",
    [
        external(offset=0, length=24, checksum="x"),
        external(offset="000", length="0024"),
        external(dims=[], offset=20),
        external(dims=[0], offset=24, length=0),
        external(dims=[5], element=TensorProto.INT4, offset=21, length=3),
        external(dims=[1000], element=0, length=24),  # its size is not known here
    ],
)
def test_ranges_inside_the_file(folder, made):
    assert examine(save(folder, holding(made))).external_bytes == WEIGHT_BYTES


def test_ranges_of_tensors_of_unknown_size_are_checked_as_well(folder):
    made = external(dims=[1], element=0, length=25)
    assert "up to byte 25" in refusal(folder, holding(made))


def test_an_entry_given_twice(folder):
    made = external()
    made.external_data.add(key="location", value="w.bin")
    assert "the same entry twice" in refusal(folder, holding(made))


def test_data_that_is_external_in_name_only_is_not_looked_for(folder):
    made = tensor()
    made.external_data.add(key="location", value="gone.bin")
    assert examine(save(folder, holding(made))).external_files == ()


def test_too_many_locations(folder, monkeypatch):
    monkeypatch.setattr(onnxtensors, "MAX_LOCATIONS", 2)
    names = ("w.bin", "./w.bin", ".//w.bin")
    many = [external(f"t{i}", n) for i, n in enumerate(names)]
    assert examine(save(folder, model(initializers=many[:2]))).external_bytes == WEIGHT_BYTES
    assert "more than 2 external data locations" in refusal(folder, model(initializers=many))


# Dims


@pytest.mark.parametrize("build", [TensorProto, lambda **kw: external("w", **kw)])
@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ([-1], "has a negative dim"),
        ([-(2**63)], "has a negative dim"),
        ([0, -2], "has a negative dim"),
        ([2**62], "has dims whose product is too large"),
        ([2**32, 2**32], "has dims whose product is too large"),
        ([2**32, 2**32, 0], "has dims whose product is too large"),
        ([2**63 - 1] * 5000, "has dims whose product is too large"),
    ],
)
def test_dims_that_no_tensor_has(folder, build, dims, reason):
    made = build(dims=dims)
    made.name, made.data_type = "w", TensorProto.FLOAT
    assert refusal(folder, holding(made)) == f"tensor 'w' {reason}"


def test_dims_of_sparse_tensors(folder):
    for dims in ([-1], [2**40, 2**40]):
        made = sparse(tensor("w", np.zeros(6, np.float32)))
        made.ClearField("dims")
        made.dims.extend(dims)
        whole = model()
        whole.graph.sparse_initializer.append(made)
        assert "tensor 'w' has" in refusal(folder, whole)


def test_dims_may_be_packed(folder):
    """As proto3 writers do; protobuf reads both."""
    assert (
        examine(save(folder, raw_model(b"\x0a\x02\x02\x03\x10\x01\x4a\x18" + bytes(24)))).ops
        == set()
    )
    reason = refusal(folder, raw_model(b"\x0a\x02\x02\x04\x10\x01\x4a\x18" + bytes(24)))
    assert reason == "a tensor has 24 bytes of data where its dims ask for 32"


# Protobuf: what is damaged, and what parsers may read in two ways


def field(number, content):
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def raw_model(initializer):
    """A model with one initializer, given by its bytes."""
    return b"\x08\x09" + field(7, field(5, initializer))


MALFORMED = "the model file is not an ONNX model (no protobuf), or it is damaged"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the model file is empty"),
        (b"\x08\x09", "holds no graph"),
        (b"\x42\x02\x10\x11", "holds no graph"),
        (b"hello, world", MALFORMED),
        (b"PK\x03\x04" + bytes(100), MALFORMED),
        (b"\0", MALFORMED),
        (b"\x3b\x3c", MALFORMED),  # a group
        (b"\x3e", MALFORMED),
        (b"\x08" + b"\xff" * 9 + b"\x02", MALFORMED),  # 65 bits
        (b"\x08" + b"\x80" * 10 + b"\x01", MALFORMED),
        (b"\xff\xff\xff\xff\xff\x01\x01", MALFORMED),  # a key of more than 32 bits
        (b"\x08", "truncated"),
        (b"\x08\x80", "truncated"),
        (b"\x80", "truncated"),
        (b"\x3a", "truncated"),
        (b"\x3a\x01", "truncated"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "truncated"),
        (b"\x3d\0\0\0", "truncated"),
        (b"\x39\0\0\0\0\0\0\0", "truncated"),
        (field(7, b"\x0a\x02") + b"\x08\x09", MALFORMED),  # past its own end, inside the file
        (field(7, b"\x0a\x05"), "truncated"),
        (field(7, b"") * 2, "gives a field twice"),
        (field(7, field(1, field(4, b"Relu") * 2)), "gives a field twice"),
        (raw_model(b"\x70\x00\x70\x01"), "gives a field twice"),
        (raw_model(b"\x70\x02"), "neither DEFAULT nor EXTERNAL"),
        (raw_model(b"\x70" + varint(2**32 + 1)), "neither DEFAULT nor EXTERNAL"),
        (raw_model(b"\x08"), "truncated"),
    ],
)
def test_bytes_that_are_no_model(folder, content, reason):
    assert reason in refusal(folder, content)


def test_fields_of_unexpected_wire_types_are_unknown_ones(folder):
    content = b"\x3d\0\0\0\0" + field(1, b"x") + b"\x38\x01" + raw_model(b"\x75\1\0\0\0")
    assert (
        examine(save(folder, content)).ir_version == onnx.load_from_string(content).ir_version == 9
    )


def test_numbers_may_be_written_longer_than_they_need(folder):
    content = b"\x88\x80\x00\x89\x00" + b"\xba\x00\x80\x00"
    assert examine(save(folder, content)).ir_version == 9


def test_an_element_type_has_32_bits(folder):
    content = raw_model(b"\x08\x03\x10" + varint(2**32 + 1) + field(9, bytes(12)))
    assert onnx.load_from_string(content).graph.initializer[0].data_type == TensorProto.FLOAT
    examine(save(folder, content))
    assert "has 12 bytes" in refusal(folder, content.replace(b"\x08\x03\x10", b"\x08\x04\x10"))


@pytest.mark.parametrize("cut", [1, 10, 50])
def test_a_truncated_model(folder, cut):
    whole = model(initializers=[tensor()])
    content = whole.graph.SerializeToString()
    assert "truncated" in refusal(folder, field(7, content)[:-cut])


def nested(depth):
    inner = b""
    for _ in range(depth - 1):
        inner = field(1, field(5, field(6, inner)))
    return field(7, inner)


def test_graphs_may_be_nested_only_so_deep(folder):
    examine(save(folder, nested(MAX_GRAPH_DEPTH)))
    assert "nested more than 64 deep" in refusal(folder, nested(MAX_GRAPH_DEPTH + 1))
    assert "nested more than 64 deep" in refusal(folder, nested(5000))


def test_names_are_bounded(folder, monkeypatch):
    long = "n" * (onnxtensors.MAX_NAME_BYTES + 1)
    assert "operator type" in refusal(folder, model([helper.make_node(long, [], [])]))
    assert "a domain" in refusal(folder, model([helper.make_node("A", [], [], domain=long)]))
    assert "graph input" in refusal(folder, model(inputs=[value(long, [1])]))
    monkeypatch.setattr(onnxfile, "MAX_NAMES", 3)
    nodes = [helper.make_node(f"Op{i}", [], []) for i in range(4)]
    assert "more than 3 operator types" in refusal(folder, model(nodes))
    inputs = [value(f"x{i}", [1]) for i in range(4)]
    assert "more than 3 graph inputs" in refusal(folder, model(inputs=inputs))
    opsets = [helper.make_opsetid(f"d{i}", 1) for i in range(4)]
    assert "more than 3 opset domains" in refusal(folder, model(opset_imports=opsets))


# The file itself


def test_files_that_cannot_be_read(folder):
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    for name, reason in {
        "gone": "cannot be opened", "gone/model.onnx": "cannot be opened", "loop": "cannot be opened",
        "w.bin/model.onnx": "cannot be opened", "a\0b": "cannot be opened",
        ".": "not a regular file", "pipe": "not a regular file",
    }.items():  # fmt: skip
        with pytest.raises(LoadError, match=reason) as caught:
            examine(folder / name)
        assert str(folder) not in caught.value.message


def test_a_file_over_2_gib(folder):
    path = folder / "model.onnx"
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1)
    with pytest.raises(LoadError, match="store its weights as external data"):
        examine(path)


# Speed: processor time, so that a busy machine is no failure


def test_data_is_skipped_not_read(folder):
    """60 initializers of 32 MiB that are all holes: reading them would take seconds."""
    size = 32 << 20
    head = b"\x08\x02" + b"\x08" + varint(size // 8) + b"\x10\x01\x4a" + varint(size)
    part = b"\x2a" + varint(len(head) + size) + head
    count = 60
    body = count * (len(part) + size)
    path = folder / "model.onnx"
    with path.open("wb") as file:
        file.write(b"\x3a" + varint(body))
        for _ in range(count):
            file.write(part)
            file.seek(size, os.SEEK_CUR)
        file.truncate()
    start = time.process_time()
    assert examine(path).file_bytes > count * size
    assert time.process_time() - start < 0.25


def test_50_000_nodes_take_well_under_a_second(folder):
    node = helper.make_node("Gemm", ["a", "w", "b"], ["c"], name="/model/gemm", alpha=1.0, transB=1)
    path = save(folder, field(7, field(1, node.SerializeToString()) * 50_000))
    start = time.process_time()
    assert examine(path).ops == {"Gemm"}
    assert time.process_time() - start < 2  # 0.4 s on an idle machine


# Whatever comes


def check_anything(folder, content):
    """Only LoadError escapes; and where onnx reads the file as well, it reads the same."""
    path, refused = save(folder, content), None
    try:
        facts = examine(path)
    except LoadError as error:
        refused = error.message
    if refused is not None:
        assert str(folder) not in refused
        assert len(refused) < 300
        return
    try:
        whole = onnx.load_from_string(content)
        named = {folder / location for location in locations_of(whole)}
        assert_true_of(facts, whole)
    except DecodeError:
        return  # in a part that is not read here
    assert {path.resolve() for path in named} == set(facts.external_files)


def seeds():
    yield many_kinds().SerializeToString()
    for build in PLACES.values():
        yield build(external(dims=[6])).SerializeToString()


SEEDS = list(seeds())
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "repeat", "cut"]),
        st.integers(0, 1 << 16),
        st.binary(min_size=1, max_size=4)
        | st.sampled_from([b"\xff" * 10, b"\x70\x01", b"\x0a\x00"]),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
)


def edited(content, edits):
    for kind, where, new, length in edits:
        at = where % (len(content) + 1)
        before, after = content[:at], content[at:]
        if kind == "set":
            content = before + new + after[len(new) :]
        elif kind == "insert":
            content = before + new + after
        elif kind == "delete":
            content = before + after[length:]
        elif kind == "repeat":
            content = before + after[:length] + after
        else:
            content = before
    return content


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes(folder, content):
    check_anything(folder, content)


@fuzz
@given(st.sampled_from(SEEDS), EDITS)
def test_any_change_of_a_good_model(folder, content, edits):
    check_anything(folder, edited(content, edits))


def test_any_single_byte_of_a_good_model_damaged(folder):
    """Whole, so that no rare place is left to chance; the bytes are those that steer the walk."""
    content = SEEDS[0]
    for at in range(len(content)):
        for new in (0x00, 0x70, 0xFF, content[at] ^ 1):
            check_anything(folder, content[:at] + bytes([new]) + content[at + 1 :])


def test_the_seeds_of_the_fuzz_are_good(folder):
    for content in SEEDS:
        examine(save(folder, content))
        assert any(
            t.data_location == TensorProto.EXTERNAL
            for t in tensors_of(onnx.load_from_string(content))
        )
