import numpy as np
import pytest

from gateway.bytestrings import serialise
from gateway.errors import InvalidRequest, TooLarge
from gateway.protocols.call import (
    InferCall,
    InputTensor,
    WantedOutput,
    check_call,
    show_name,
    unexpected_input,
)
from gateway.tensors import DATATYPES

from .support import (
    ANY_WORDS,
    BINARY_ONLY,
    DIGITS,
    FIXED_SIZE,
    MAX_BYTES,
    PAIR,
    WORDS,
    optional,
    signature,
    spec,
    unranked,
    whole,
)


def tensor(name="x", datatype="FP32", shape=(2, 4), data=None):
    return InputTensor(name, DATATYPES[datatype], shape, [] if data is None else data)


def pair(ids_shape, mask_shape):
    return InferCall([tensor("ids", "INT64", ids_shape), tensor("mask", "BOOL", mask_shape)])


def refusal(call, against=DIGITS, max_bytes=MAX_BYTES):
    with pytest.raises(InvalidRequest) as caught:
        check_call(call, against, max_bytes)
    assert call.rows == 0
    return caught.value.message


def test_rows_are_set():
    call = InferCall([tensor()])
    check_call(call, DIGITS, MAX_BYTES)
    assert call.rows == 2


def test_inputs_may_come_in_any_order():
    call = pair((3, 7), (3, 7))
    call.inputs.reverse()
    check_call(call, PAIR, MAX_BYTES)
    assert call.rows == 3


def test_unknown_input():
    assert refusal(InferCall([tensor("z")])) == "unexpected inference input 'z'"
    assert refusal(InferCall([tensor("a b\n")])) == ("unexpected inference input <name not shown>")


def test_input_given_twice():
    assert refusal(InferCall([tensor(), tensor()])) == "input 'x' is given twice"


def test_missing_inputs_are_all_named():
    three = signature([spec(name, "FP32", "N") for name in ("a", "b", "c")])
    assert refusal(InferCall([tensor("b", shape=(1,))]), three) == (
        "expected 3 inputs but got 1, missing: 'a', 'c'"
    )


def test_wrong_datatype():
    assert refusal(InferCall([tensor(datatype="INT64")])) == (
        "input 'x' has datatype INT64, expected FP32"
    )


def words(shape, raw):
    return InferCall([tensor("s", "BYTES", shape, memoryview(raw))])


@pytest.mark.parametrize("elements", [4, 2**40])
def test_strings_are_counted(elements):
    good = words((2, 2), serialise([b"", b"a\0\xff", b"", b"x" * 300]))
    check_call(good, WORDS, MAX_BYTES)
    assert good.rows == 2
    check_call(words((2, 0, 7), b""), ANY_WORDS, MAX_BYTES)
    check_call(words((), serialise([b"one"])), ANY_WORDS, MAX_BYTES)
    shape, shown = (elements,), f"input 's': expected {elements} strings for shape [{elements}]"
    for count in (0, 3):
        raw = serialise([b"ab"] * count)
        assert refusal(words(shape, raw), ANY_WORDS) == f"{shown}, but the data end after {count}"
    for raw, problem in ((b"\x05\0\0\0abcd", "a string"), (b"\0\0\0\0\0", "a length")):
        assert refusal(words(shape, raw), ANY_WORDS) == (
            f"{shown}, but the data end within {problem}"
        )
    assert refusal(words((1,), serialise([b"", b"ab"])), ANY_WORDS) == (
        "input 's': expected 1 strings for shape [1], but 6 bytes are left over"
    )


def test_strings_take_the_bytes_of_their_raw_form():
    call = words((1, 2), serialise([b"abc", b"d"]))
    check_call(call, WORDS, 12)
    with pytest.raises(TooLarge, match="take 12 bytes as tensors"):
        check_call(call, WORDS, 11)


def test_strings_that_are_not_raw_are_a_mistake_of_ours():
    with pytest.raises(TypeError):
        check_call(InferCall([tensor("s", "BYTES", (1,), ["a"])]), ANY_WORDS, MAX_BYTES)


def test_strings_where_numbers_belong_and_the_other_way_round():
    assert refusal(InferCall([tensor(datatype="BYTES")])) == (
        "input 'x' has datatype BYTES, expected FP32"
    )
    assert refusal(InferCall([tensor("s", "FP32", (1, 2))]), WORDS) == (
        "input 's' has datatype FP32, expected BYTES"
    )


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ((), ()),
        ((3,), (3,)),
        (("N", 3), (0, 3)),
        ((None, "M"), (5, 0)),
        ((2,) * 8, (2,) * 8),
        (None, ()),
        (None, (1, 0, 3)),
        (None, (1,) * 8),
    ],
)
def test_whole_models_take_their_full_shape(declared, shape):
    model = whole([unranked("x", "FP32") if declared is None else spec("x", "FP32", *declared)])
    call = InferCall([tensor(shape=shape)])
    check_call(call, model, MAX_BYTES)
    assert call.rows == 1


@pytest.mark.parametrize(
    ("declared", "shape", "message"),
    [
        ((), (1,), "expected [], got [1]"),
        ((3,), (1, 3), "expected [3], got [1,3]"),  # a batch dim on a model without batches
        ((3,), (2,), "expected [3], got [2]"),
        ((3,), (), "expected [3], got []"),
        (("N", 3), (2, 4), "expected [-1,3], got [2,4]"),
        (("N",), (-1,), "input 'x' has a negative dim"),
        (None, (2, -1), "input 'x' has a negative dim"),
        (None, (1,) * 9, "expected [-1], got [1,1,1,1,1,1,1,1,1]"),
        (None, (2**62, 2), "more than 2^63-1 elements"),
        (None, (2**63, 0), "more than 2^63-1 elements"),
    ],
)
def test_shapes_that_do_not_fit_whole_models(declared, shape, message):
    model = whole([unranked("x", "FP32") if declared is None else spec("x", "FP32", *declared)])
    assert message in refusal(InferCall([tensor(shape=shape)]), model)


def test_symbolic_dims_of_whole_models_bind_in_every_place():
    model = whole([spec("a", "FP32", "N", "M"), spec("b", "FP32", "N")])
    check_call(InferCall([tensor("a", shape=(3, 2)), tensor("b", shape=(3,))]), model, MAX_BYTES)
    assert refusal(InferCall([tensor("a", shape=(3, 2)), tensor("b", shape=(2,))]), model) == (
        "input 'b': dim 0 is 2, but 'N' is 3 elsewhere in the request"
    )


def test_whole_models_without_inputs():
    call = InferCall([])
    check_call(call, whole([]), MAX_BYTES)
    assert call.rows == 1


def test_optional_inputs():
    scaled = signature(
        [spec("x", "FP32", "N", 4), optional("by", "FP32"), optional("k", "INT64", "K")]
    )
    only = InferCall([tensor()])
    check_call(only, scaled, MAX_BYTES)
    assert only.rows == 2
    full = InferCall([tensor("k", "INT64", (5,)), tensor("by", shape=()), tensor()])
    check_call(full, scaled, MAX_BYTES)
    assert full.rows == 2
    assert refusal(InferCall([tensor("by", shape=())]), scaled) == (
        "expected 1 inputs but got 0, missing: 'x'"
    )
    assert refusal(InferCall([tensor(), tensor("by", shape=(2,))]), scaled) == (
        "unexpected shape for input 'by': expected [], got [2]"
    )
    check_call(InferCall([tensor(), tensor("k", "INT64", (0,))]), scaled, MAX_BYTES)


def test_optional_inputs_take_no_part_in_the_rows():
    model = signature([spec("a", "FP32", "N"), spec("b", "FP32", "N"), optional("o", "FP32", "K")])
    uneven = [tensor("o", shape=(9,)), tensor("a", shape=(2,)), tensor("b", shape=(3,))]
    assert refusal(InferCall(uneven), model) == (
        "input 'b' has 3 rows, 'a' has 2: every input needs as many"
    )


def test_symbolic_dims_of_optional_inputs_bind_too():
    model = signature([spec("x", "FP32", "N", "T"), optional("o", "FP32", "T")])
    check_call(InferCall([tensor(), tensor("o", shape=(4,))]), model, MAX_BYTES)
    assert refusal(InferCall([tensor(), tensor("o", shape=(5,))]), model) == (
        "input 'o': dim 0 is 5, but 'T' is 4 elsewhere in the request"
    )


@pytest.mark.parametrize("datatype", BINARY_ONLY, ids=lambda t: t.name)
def test_binary_only_datatypes(datatype):
    half = signature(
        [spec("x", datatype.name, "N", 2)], [spec("y", datatype.name, "N"), spec("z", "FP32", "N")]
    )
    listed = InferCall([InputTensor("x", datatype, (1, 2), [1, 2])], binary_outputs=True)
    assert refusal(listed, half).startswith(f"input 'x': {datatype.name} has no JSON")
    raw = InferCall([InputTensor("x", datatype, (1, 2), memoryview(bytes(4)))])
    assert refusal(raw, half).startswith(f"output 'y': {datatype.name} has no JSON")
    raw.outputs = [WantedOutput("y", binary=False)]
    assert refusal(raw, half).startswith(f"output 'y': {datatype.name} has no JSON")
    raw.outputs = [WantedOutput("z", binary=False), WantedOutput("y", binary=True)]
    check_call(raw, half, MAX_BYTES)


@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (2, 4, 1), (2, 0)])
def test_shapes_that_do_not_fit(shape):
    assert refusal(InferCall([tensor(shape=shape)])) == (
        f"unexpected shape for input 'x': expected [-1,4], got [{','.join(map(str, shape))}]"
    )


def test_fixed_batch_dim():
    single = signature([spec("x", "FP32", 1, 4)], max_batch_size=1)
    check_call(InferCall([tensor(shape=(1, 4))]), single, MAX_BYTES)
    assert "expected [1,4], got [2,4]" in refusal(InferCall([tensor(shape=(2, 4))]), single)


@pytest.mark.parametrize("shape", [(-2, 4), (2, -4)])
def test_negative_dims(shape):
    assert refusal(InferCall([tensor(shape=shape)])) == "input 'x' has a negative dim"


def test_symbolic_dims_are_consistent_within_a_request():
    check_call(pair((2, 5), (2, 5)), PAIR, MAX_BYTES)
    assert refusal(pair((2, 5), (2, 6)), PAIR) == (
        "input 'mask': dim 1 is 6, but 'T' is 5 elsewhere in the request"
    )
    square = signature([spec("x", "FP32", "N", "S", "S")])
    assert "dim 2 is 4, but 'S' is 3" in refusal(InferCall([tensor(shape=(1, 3, 4))]), square)


def test_unnamed_dims_are_free():
    free = signature([spec("x", "FP32", None, None), spec("y", "FP32", None, None)])
    call = InferCall([tensor("x", shape=(1, 2)), tensor("y", shape=(1, 3))])
    check_call(call, free, MAX_BYTES)


def test_the_name_of_the_batch_dim_binds_no_other():
    again = signature([spec("x", "FP32", "N", "N")])
    check_call(InferCall([tensor(shape=(2, 5))]), again, MAX_BYTES)


def test_every_input_has_as_many_rows():
    assert refusal(pair((2, 5), (3, 5)), PAIR) == (
        "input 'mask' has 3 rows, 'ids' has 2: every input needs as many"
    )


def test_zero_rows():
    assert "input 'x' has no rows" in refusal(InferCall([tensor(shape=(0, 4))]))
    assert refusal(InferCall([]), signature([])) == "the request has no rows"


def test_zero_elements_are_fine_beside_rows():
    call = pair((2, 0), (2, 0))
    check_call(call, PAIR, MAX_BYTES)
    assert call.rows == 2


def test_batch_size():
    check_call(InferCall([tensor(shape=(8, 4))]), DIGITS, MAX_BYTES)
    assert refusal(InferCall([tensor(shape=(9, 4))])) == ("request batch-size must be <= 8, got 9")


@pytest.mark.parametrize(
    "shape",
    [
        (2**62, 2),
        (2**32, 2**32),
        (1, 2**63),
        (1, 2**64),
        (10**4000, 2),
        (2**63, 0),
        (0, 2**63),
    ],
)
def test_element_counts_over_int64(shape):
    free = signature([spec("x", "FP32", "N", None)], max_batch_size=4096)
    assert refusal(InferCall([tensor(shape=shape)]), free) == (
        "input 'x': its shape names more than 2^63-1 elements"
    )
    fixed = InferCall([tensor(shape=(1, 2**63))])
    assert "more than 2^63-1 elements" in refusal(fixed)


def test_dims_beside_a_zero_do_not_overflow():
    free = signature([spec("x", "FP32", "N", None, None, None)])
    assert "more than 2^63-1" in refusal(InferCall([tensor(shape=(1, 0, 2**40, 2**40))]), free)


def test_symbols_show_no_long_numbers():
    assert "over 2^63-1" in refusal(pair((1, 5), (1, 10**4000)), PAIR)


@pytest.mark.parametrize("datatype", FIXED_SIZE, ids=lambda t: t.name)
def test_bytes_of_raw_data(datatype):
    sized = signature([spec("x", datatype.name, "N", 3)])
    exact = 6 * np.dtype(datatype.dtype).itemsize
    for size in (0, exact - 1, exact + 1):
        call = InferCall(
            [InputTensor("x", datatype, (2, 3), memoryview(bytes(size)))], binary_outputs=True
        )
        assert refusal(call, sized) == (
            f"input 'x': expected {exact} bytes of data for shape [2,3], got {size}"
        )
    call.inputs[0].data = memoryview(bytes(exact))
    check_call(call, sized, MAX_BYTES)


def test_lists_that_expand_past_the_limit():
    call = InferCall([tensor(data=[1])])
    check_call(call, DIGITS, 32)
    with pytest.raises(TooLarge, match="take 32 bytes as tensors, max_request_bytes is 31"):
        check_call(call, DIGITS, 31)
    both = pair((2, 5), (2, 5))
    check_call(both, PAIR, 90)
    with pytest.raises(TooLarge, match="max_request_bytes"):
        check_call(both, PAIR, 89)


def test_outputs():
    call = pair((1, 1), (1, 1))
    call.outputs = [WantedOutput("score", binary=False), WantedOutput("label", binary=True)]
    check_call(call, PAIR, MAX_BYTES)


def test_unknown_output():
    call = InferCall([tensor()], outputs=[WantedOutput("z", binary=True)])
    assert refusal(call) == "unexpected inference output 'z'"
    call.outputs = [WantedOutput("\0", binary=True)]
    assert refusal(call) == "unexpected inference output <name not shown>"


def test_output_requested_twice():
    call = InferCall([tensor()], outputs=[WantedOutput("y", True), WantedOutput("y", False)])
    assert refusal(call) == "output 'y' is requested twice"


def test_names_are_refused_before_shapes():
    call = InferCall([tensor(shape=(9, 9))], outputs=[WantedOutput("z", binary=True)])
    assert "unexpected inference output" in refusal(call)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a", "'a'"),
        ("A0_.-" + "x" * 59, "'A0_.-" + "x" * 59 + "'"),
        ("x" * 65, "<name not shown>"),
        ("", "<name not shown>"),
        ("_a", "<name not shown>"),
        ("a\n", "<name not shown>"),
        ("<script>", "<name not shown>"),
        ("é", "<name not shown>"),
        (7, "<name not shown>"),
        (None, "<name not shown>"),
    ],
)
def test_show_name(name, shown):
    assert show_name(name) == shown


def test_names_of_the_model_are_shown_as_they_are():
    known = (spec("serving/in:0", "FP32", "N"),)
    assert show_name("serving/in:0", known) == "'serving/in:0'"
    assert show_name("serving/in:1", known) == "<name not shown>"
    assert "<name not shown>" in unexpected_input("serving/in:1").message
