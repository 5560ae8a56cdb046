"""Loading: what a model is served as, what is refused and why, and what it is warmed up with."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import onnx
import pytest

from gateway.errors import LoadError
from gateway.serving import geometry, loader, strings
from gateway.serving.loader import MAX_WARMUP_SHAPES
from gateway.serving.plan import LoadPlan
from gateway.serving.session import ModelSession
from gateway.tensors import Padding
from tests.zoo.building import parse

IN_PLACE = "written in place by ONNX Runtime"

NEGATED = "(float[n, 4] x) => (float[n, 4] y) { y = Neg (x) }"


@pytest.fixture
def write(tmp_path):
    """Writes a graph, or a model, to where a repository has it; its path."""

    def make(graph, **constants):
        model = parse(graph, **constants) if isinstance(graph, str) else graph
        folder = tmp_path / "m" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    return make


@pytest.fixture
def load(write):
    """Writes and loads a graph. Never with memory_bytes: that limit would stay on this process."""

    def make(graph, *, constants=None, **settings):
        path = write(graph, **(constants or {}))
        return loader.load(LoadPlan(str(path), **settings), lambda: None)

    return make


@pytest.fixture
def runs(monkeypatch):
    """The dims of each input of every run, in order."""
    seen = []
    run_arrays = ModelSession.run_arrays

    def spy(session, arrays):
        seen.append({name: array.shape for name, array in arrays.items()})
        return run_arrays(session, arrays)

    monkeypatch.setattr(ModelSession, "run_arrays", spy)
    return seen


def test_a_plain_model_is_batched_and_its_outputs_are_written_in_place(load):
    loaded = load(NEGATED)
    assert loaded.signature.max_batch_size == 64
    assert loaded.signature.describes_outputs is False
    assert loaded.understanding.outputs == IN_PLACE
    assert loaded.understanding.batching.startswith("batches of up to 64 rows")
    assert loaded.understanding.notes == ()


def test_the_caller_hears_when_the_file_is_open_and_nothing_has_run(write, runs):
    heard = []
    loader.load(LoadPlan(str(write(NEGATED))), lambda: heard.append(len(runs)))
    assert heard == [0]
    assert runs


def test_a_file_that_is_no_model_is_a_load_error_before_anything_is_said(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    heard = []
    with pytest.raises(LoadError):
        loader.load(LoadPlan(str(path)), lambda: heard.append(1))
    assert heard == []


def test_settings_that_were_not_followed_are_noted(load):
    loaded = load(
        "(float[n] x) => (float[n] y) { m = ReduceMax (x)  y = Div (x, m) }", max_batch_size=8
    )
    assert loaded.signature.max_batch_size == 0
    assert "its rows' answers change" in loaded.understanding.batching
    assert "its settings ask for batches, which its answers do not allow" in (
        loaded.understanding.notes
    )


# Outputs

LIE = (
    "(float[n, k] x) => (float[n, k] y) {{ shape = Shape (x) "
    "zero = Constant <value = int64 {{0}}> ()  add = Constant <value = int64[2] {{1, {width}}}> () "
    "none = Mul (shape, zero)  wanted = Add (none, add) "
    "axis = Constant <value = int64[1] {{1}}> ()  one = ReduceMax (x, axis) "
    "y = Expand (one, wanted) }}"
)

COPIED = {
    "an input is an output": (
        "(float[n, 4] x) => (float[n, 4] y, float[n, 4] x) { y = Neg (x) }",
        "output 'x' is not written where it is bound",
    ),
    "a shape that is a lie": (
        LIE.format(width=7),
        "the graph declares shapes that its outputs do not have",
    ),
    "a shape that is true by chance": (
        LIE.format(width=4),
        "the graph declares shapes that its outputs do not have",
    ),
    "control flow": (
        "(bool c, float[2] x) => (float[2] y) { y = If (c) <"
        "then_branch = a () => (float[2] t) { t = Neg (x) }, "
        "else_branch = b () => (float[2] e) { e = Abs (x) }> }",
        "its control flow may give other outputs at other inputs",
    ),
    "strings in": (
        "(string[n] x) => (double[n] y) { y = Cast <to = 11> (x) }",
        "'x' holds strings",
    ),
    "strings out": ("(int64[n] x) => (string[n] y) { y = Cast <to = 8> (x) }", "'y' holds strings"),
    "nothing runs": (
        "(int64[n] x) => (float[n] y) <float[0] w = {}> { y = Gather (w, x) }",
        "no made-up input ran, so it was not seen where outputs are written",
    ),
}


@pytest.mark.parametrize("name", COPIED)
def test_outputs_that_may_not_be_written_in_place_are_copied_and_it_is_said_why(load, name):
    graph, reason = COPIED[name]
    loaded = load(graph)
    assert loaded.signature.describes_outputs is True
    assert loaded.understanding.outputs == f"copied after each run: {reason}"


def test_an_output_that_is_a_constant_arrives(load):
    """Whether ONNX Runtime writes it where it is bound is its own business; the test at load knows."""
    loaded = load(
        "(float[2] x) => (float[2] y, float[2] w) { y = Neg (x) }",
        constants={"w": np.array([5, 6], np.float32)},
    )
    shape = geometry.shape_of(loaded.signature, ((2,),), 1)
    inputs = np.zeros(shape.input_bytes, np.uint8)
    outputs = np.full(shape.output_bytes, 0xAA, np.uint8)
    binding = loaded.session.bind(shape, 1, inputs.ctypes.data, outputs.ctypes.data)
    loaded.session.run(binding)
    if shape.outputs is None:
        w = loaded.session.unbound_outputs(binding)[1]
    else:
        begin, end = shape.outputs[1].span(0, 1)
        w = outputs[begin:end].view(np.float32)
    assert w.tolist() == [5, 6]


@pytest.mark.parametrize(
    "graph",
    [
        "(float[] x) => (float[k] y) { l = Constant <value = int64[1] {-1}> ()  y = Reshape (x, l) }",
        "(float[] x) => (float[] y) { y = Neg (x) }",
        "(float[n] x) => (int64[1, found] y) { y = NonZero (x) }",
    ],
)
def test_outputs_whose_size_only_the_run_tells_are_copied(load, graph):
    loaded = load(graph)
    assert loaded.understanding.outputs == (
        "copied after each run: the size of 'y' is only known then"
    )
    assert loaded.signature.describes_outputs is False  # their shapes already say so


def test_a_scalar_and_no_elements_are_written_in_place(load):
    loaded = load(
        "(float x, float[n, 0] z) => (float y, float[n, 0] w, float[2, 2] v) "
        "{ y = Neg (x)  w = Neg (z)  s = Constant <value = int64[2] {2, 2}> () v = Expand (x, s) }"
    )
    assert loaded.understanding.outputs == IN_PLACE


# Warm-up

PADDED = (
    "(float[n, length] x, int64[n, length, width] ids) "
    "=> (float[n, length] y, int64[n, length, width] z) { y = Neg (x)  z = Neg (ids) }"
)


def test_every_bucket_is_warmed_up_at_every_size(load, runs):
    lengths, widths, sizes = (2, 5), (3, 7), (1, 2, 4)
    load(
        PADDED,
        allowed_batch_sizes=sizes,
        padding=(Padding("length", lengths, True, ()), Padding("width", widths, False, ())),
    )
    expected = [
        {"x": (rows, length), "ids": (rows, length, width)}
        for rows, length, width in itertools.product(sizes, lengths, widths)
    ]
    assert runs[-len(expected) :] == expected


def test_no_more_than_so_many_combinations_are_warmed_up_the_smallest_first(load, runs):
    many = tuple(range(1, MAX_WARMUP_SHAPES))
    load(
        PADDED,
        max_batch_size=1,
        padding=(Padding("length", (1, 2), True, ()), Padding("width", many, True, ())),
    )
    warmed = runs[-MAX_WARMUP_SHAPES:]
    assert [run["ids"][2] for run in warmed] == [*many, 1]
    assert runs[-MAX_WARMUP_SHAPES - 1] != warmed[0]


@pytest.mark.parametrize(("settings", "sizes"), [({}, [1, 64]), ({"max_batch_size": 5}, [1, 5])])
def test_without_sizes_the_smallest_and_the_largest_batch_are_warmed_up(
    load, runs, settings, sizes
):
    load(NEGATED, **settings)
    assert [run["x"] for run in runs[-2:]] == [(rows, 4) for rows in sizes]


def test_a_whole_model_is_warmed_up_once(load, runs):
    load("(float[3, 2] x) => (float[3, 2] y) { y = Neg (x) }")
    first = len(runs)
    load("(float[3, 2] x) => (float[3, 2] y) { y = Neg (x) }", warmup=False)
    assert {run["x"] for run in runs} == {(3, 2)}
    assert first - (len(runs) - first) == 1


def test_without_a_warm_up_the_sizes_are_not_run(load, runs):
    load(NEGATED, max_batch_size=50, warmup=False)
    assert (50, 4) not in [run["x"] for run in runs]


SEVEN = (
    "(float[n, 4] x) => (float[n, 7] y) "
    "{ s = Constant <value = int64[2] {-1, 7}> ()  y = Reshape (x, s) }"
)
"""Twelve numbers do not make columns of seven, but 28 do."""

NOT_WARM = "not warmed up: no made-up input ran; warmup_samples can name some that do"

UP_TO_THREE = (
    "(float[n] x) => (float[n] y) "
    "{ w = Constant <value = float[3] {0, 0, 0}> ()  zero = Constant <value = int64[1] {0}> () "
    "rows = Shape (x)  part = Slice (w, zero, rows)  y = Add (x, part) }"
)
"""Adds a part of three numbers that is as long as the batch."""


def test_a_model_that_fails_on_every_input_is_refused(load):
    with pytest.raises(LoadError, match="fails on every input that was tried at its warm-up"):
        load(
            "(float[12] x) => (float[k, 7] y) { m = ReduceMax <keepdims = 0> (x)  z = Sub (m, m) "
            "i = Cast <to = 7> (z)  made = Add (s, i)  y = Reshape (x, made) }",
            constants={"s": np.array([-1, 7])},
        )
    with pytest.raises(LoadError, match="fails on every input that was tried at its warm-up"):
        load(SEVEN, max_batch_size=4)


def test_a_dim_that_may_suit_is_left_to_the_clients(load):
    loaded = load(SEVEN)
    assert not loaded.signature.is_batched
    assert loaded.understanding.notes == (NOT_WARM,)
    (y,) = loaded.session.run_arrays({"x": np.zeros((7, 4), np.float32)})
    assert y.shape == (4, 7)


def test_a_size_at_which_it_fails_is_named(load):
    with pytest.raises(
        LoadError, match=r"the warm-up with 5 rows failed: .* in a Add node"
    ) as caught:
        load(UP_TO_THREE, allowed_batch_sizes=(2, 5, 8))
    assert "3 by 5" in caught.value.detail  # what the runtime says in full, for the operator
    assert "3 by 5" not in caught.value.message
    loaded = load(UP_TO_THREE, allowed_batch_sizes=(2, 3))
    assert loaded.signature.max_batch_size == 3


def test_a_model_whose_indices_cannot_be_made_up_is_served_and_it_is_noted(load):
    loaded = load("(int64[n] x) => (float[n] y) <float[0] w = {}> { y = Gather (w, x) }")
    assert not loaded.signature.is_batched
    assert loaded.understanding.notes == (NOT_WARM,)


# Samples of the operator's

TAKES_SAMPLES = (
    "(float[n, 2] x, string[n] s, bfloat16 b, float scale = {2}) "
    "=> (float[n, 2] y, string[n] t, bfloat16 c) "
    "{ y = Mul (x, scale)  t = Identity (s)  c = Identity (b) }"
)
GOOD = {
    "x": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2)),
    "s": np.array(["a", "zürich", ""]),
    "b": np.array(0x3F80, np.uint16),
}


@pytest.fixture
def sampled(load, tmp_path):
    """Loads with samples from a file of these arrays or bytes, or that this function makes."""

    def make(graph, arrays):
        path = tmp_path / "m" / "samples.npz"
        path.parent.mkdir(exist_ok=True)
        if isinstance(arrays, bytes):
            path.write_bytes(arrays)
        elif callable(arrays):
            arrays(path)
        elif arrays is not None:
            np.savez(path, **arrays)
        return load(graph, warmup_samples=str(path))

    return make


@pytest.mark.parametrize(
    "arrays",
    [
        GOOD,
        GOOD | {"scale": np.array(3, np.float32)},
        GOOD | {"s": np.array([b"a", b"\xff\0b", b""])},
    ],
    ids=["text", "optional", "bytes"],
)
def test_samples_are_run_instead_of_made_up_ones(sampled, runs, monkeypatch, arrays):
    given = []
    run_arrays = ModelSession.run_arrays
    monkeypatch.setattr(
        ModelSession, "run_arrays", lambda session, a: given.append(a) or run_arrays(session, a)
    )
    sampled(TAKES_SAMPLES, arrays)
    last = given[-1]
    assert last.keys() == arrays.keys()
    for name in arrays.keys() - {"s"}:
        np.testing.assert_array_equal(last[name], arrays[name])
        assert last[name].shape == arrays[name].shape
        assert last[name].flags.c_contiguous
    expected = [v if isinstance(v, bytes) else v.encode() for v in arrays["s"].tolist()]
    assert last["s"].tolist() == expected


def pickled() -> dict:
    return GOOD | {"s": np.array([b"a", b"b", {}], object)}


def archive() -> bytearray:
    out = io.BytesIO()
    np.savez_compressed(out, **GOOD | {"x": np.random.default_rng(0).random((50, 2), np.float32)})
    return bytearray(out.getvalue())


def damaged() -> bytes:
    """Nonsense in the middle of the first array."""
    made = archive()
    made[60:160] = b"\xff" * 100
    return bytes(made)


def encrypted() -> bytes:
    """With the flag that says so, in both of the archive's lists."""
    made = archive()
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        begin = 0
        while (begin := made.find(mark, begin)) >= 0:
            made[begin + at] |= 1
            begin += 4
    return bytes(made)


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


def npy(header: str, data: bytes = b"") -> bytes:
    """An array as NumPy writes it, whatever its header says."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


def with_member(name: str, data: bytes) -> bytes:
    """Samples of which one array is these bytes."""
    out = io.BytesIO()
    np.savez(out, **without(name))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(f"{name}.npy", data)
    return out.getvalue()


def text_of(code: int) -> bytes:
    header = "{'descr': '<U1', 'fortran_order': False, 'shape': (3,), }"
    return npy(header, struct.pack("<III", code, code, code))


def shaped(dim: int) -> bytes:
    return npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({dim}, 2), }}", bytes(8))


def link_out(path):
    np.savez(path.parent.parent / "elsewhere.npz", **GOOD)
    path.symlink_to(path.parent.parent / "elsewhere.npz")


BAD_SAMPLES = {
    "half a surrogate pair": (with_member("s", text_of(0xD800)), "'s' holds what is no text"),
    "no code point": (with_member("s", text_of(0x7FFFFFFF)), "'s' holds what is no text"),
    "a header without end": (with_member("x", npy("{'descr': ('")), "cannot be read"),
    "a header of open text": (with_member("x", npy("{'descr': '''")), "cannot be read"),
    "a dim beyond 64 bits": (with_member("x", shaped(1 << 70)), "cannot be read"),
    "a dim below zero": (with_member("x", shaped(-1)), "cannot be read"),
    "a member that is no array": (with_member("x", b"hello"), "'x' is no array"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a folder": (os.mkdir, "is not a regular file"),
    "a link out of the model's folder": (link_out, "leads out of the model's folder"),
    "a circle of links": (lambda path: path.symlink_to(path), "cannot be read"),
    "no file": (None, "cannot be read"),
    "not an archive": (b"nonsense", "cannot be read"),
    "an empty file": (b"", "cannot be read"),
    "a truncated archive": (b"PK\3\4" + b"\0" * 40, "cannot be read"),
    "a pickle": (b"\x80\4N.", "cannot be read"),
    "one array": (
        b"\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }".ljust(127)
        + b"\n\0\0\0\0",
        "cannot be read",
    ),
    "objects": (pickled(), "cannot be read"),
    "a damaged array": (damaged(), "cannot be read"),
    "an encrypted array": (encrypted(), "cannot be read"),
    "one lacks": (without("x"), r"must hold the model's inputs: .* missing: 'x'$"),
    "one too many": (GOOD | {"z": np.zeros(1)}, "1 of its arrays are none"),
    "another datatype": (GOOD | {"x": np.zeros((3, 2))}, "'x' is float64, expected FP32"),
    "another byte order": (
        GOOD | {"x": np.zeros((3, 2), ">f4")},
        "'x' is >f4, expected FP32",
    ),
    "text for numbers": (GOOD | {"x": np.array([["1", "2"]])}, "'x' is <U1, expected FP32"),
    "numbers for text": (GOOD | {"s": np.zeros(3)}, "'s' is float64, expected BYTES"),
    "other dims": (GOOD | {"x": np.zeros((3, 5), np.float32)}, "the warm-up failed"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_samples_that_are_none_are_a_load_error(sampled, name):
    arrays, reason = BAD_SAMPLES[name]
    with pytest.raises(LoadError, match=reason) as caught:
        sampled(TAKES_SAMPLES, arrays)
    assert str(os.sep) not in caught.value.message


def test_nothing_in_samples_is_ever_unpickled(sampled, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    with pytest.raises(LoadError, match="cannot be read"):
        sampled(TAKES_SAMPLES, GOOD | {"s": np.array([Bomb()], object)})
    assert not (tmp_path / "exploded").exists()


def test_samples_on_which_the_model_fails_are_a_load_error(sampled):
    graph = "(int64[n] i) => (float[n] y) <float[2] w = {1, 2}> { y = Gather (w, i) }"
    sampled(graph, {"i": np.array([0, 1])})
    with pytest.raises(LoadError, match="the warm-up failed: ONNX Runtime failed"):
        sampled(graph, {"i": np.array([0, 5])})


def test_samples_serve_where_nothing_made_up_runs(sampled):
    graph = "(int64[n] i, float[w] t) => (float[n] y) { y = Gather (t, i) }"
    arrays = {"i": np.array([0, 300]), "t": np.zeros(400, np.float32)}
    assert sampled(graph, arrays).understanding.notes == ()


# Padding

IDS = "(int64[n, length] ids, float[n, k] x, string[n] s, bool m = {0}) => (int64[n, length] y) " \
    "{ y = Neg (ids) }"  # fmt: skip


def pad(dim="length", **values):
    return {"padding": (Padding(dim, (4, 8), True, tuple(values.items())),)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            pad("other"),
            r"names the dim 'other', which no input has within a row; .*: 'k', 'length', 'n'$",
        ),
        (pad("n"), "names the dim 'n', which no input has within a row"),
        (pad(nothing=1), "padding of 'length' names the input 'nothing', unknown here"),
        (pad(y=1), "names the input 'y', unknown here"),
        (pad(ids=0.5), "input 'ids' is INT64: it cannot hold 0.5"),
        (pad(ids=float("nan")), "input 'ids' is INT64: it cannot hold nan"),
        (pad(ids=float("-inf")), "input 'ids' is INT64: it cannot hold -inf"),
        (pad(ids=1 << 63), "input 'ids' is INT64: it cannot hold 9223372036854775808"),
        (pad(m=2), "input 'm' is BOOL: it cannot hold 2"),
        (pad(s=1), "input 's' holds strings: it cannot be padded"),
    ],
)
def test_padding_that_does_not_fit_the_graph_is_refused(load, settings, reason):
    with pytest.raises(LoadError, match=reason):
        load(IDS, **settings)


@pytest.mark.parametrize(
    "values", [{}, {"ids": -1}, {"ids": -(1 << 63)}, {"ids": 3.0}, {"m": 1}, {"x": float("-inf")}]
)
def test_padding_that_fits_becomes_part_of_the_signature(load, values):
    loaded = load(IDS, **pad(**values))
    assert loaded.signature.padding == pad(**values)["padding"]


def test_strings_cannot_be_padded(load):
    with pytest.raises(LoadError, match="'s' has the padded dim 'length' and holds strings"):
        load("(float[n, length] x, string[n, length] s) => (float[n, length] y) { y = Neg (x) }",
             **pad())  # fmt: skip


def test_an_output_alone_cannot_be_padded(load):
    with pytest.raises(LoadError, match=r"symbolic dims of the inputs: 'n'$"):
        load("(float[n] x) => (int64[n, length] y) { y = NonZero (x) }", **pad())


# Memory


def in_another_process(code: str) -> str:
    """What code printed that ran in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip()


def loaded_with(path, memory_bytes: int) -> str:
    """The error, or what the model was understood as, with a budget of its own."""
    return in_another_process(f"""
        from gateway.errors import LoadError
        from gateway.serving import loader
        from gateway.serving.plan import LoadPlan
        try:
            loaded = loader.load(LoadPlan({str(path)!r}, memory_bytes={memory_bytes}), lambda: None)
        except LoadError as error:
            print(error.message)
        else:
            print(loaded.understanding.batching)
    """)


@pytest.mark.parametrize("settings", [{"memory_bytes": 4096}, {"memory_left_bytes": 4096}])
def test_files_beyond_the_budget_are_refused_unopened(load, runs, settings):
    """Before the process limits itself, which is why memory_bytes may be given here."""
    whose = "memory_bytes in its config.yaml allows 4096"
    if "memory_left_bytes" in settings:
        whose = "bytes of memory and the server has 4096 left"
    with pytest.raises(LoadError, match=whose):
        load(
            "(float[n, 2000] x) => (float[n, 2000] y) { y = Add (x, w) }",
            constants={"w": np.zeros(2000, np.float32)},
            **settings,
        )
    assert runs == []


HUNGRY = {
    "a constant made by the optimiser or the run": "(float[1] x) => (float[a, b] y) "
    "{ s = Constant <value = int64[2] {30000, 30000}> ()  c = ConstantOfShape (s)  y = Add (c, x) }",
    "an expansion at the warm-up": "(float[n, 4] x) => (float[n, 4] y) "
    "{ s = Constant <value = int64[3] {300000000, 1, 1}> ()  e = Expand (x, s) "
    "a = Constant <value = int64[1] {0}> ()  y = ReduceMax <keepdims = 0> (e, a) }",
}


@pytest.mark.parametrize("name", HUNGRY)
def test_a_model_that_needs_more_than_its_budget_is_refused(write, name):
    message = loaded_with(write(HUNGRY[name]), 256 << 20)
    assert message == (
        "loading it takes more memory than memory_bytes in its config.yaml (268435456) allows"
    )


def test_a_model_within_its_budget_is_served(write):
    assert loaded_with(write(NEGATED), 512 << 20).startswith("batches of up to 64 rows")


def test_a_model_that_turns_out_larger_than_what_is_left_is_refused(write):
    """20 MB of weights in a file of 200 bytes."""
    path = write(
        "(float[n, 5000000] x) => (float[n] y) { s = Constant <value = int64[1] {5000000}> () "
        "w = ConstantOfShape <value = float[1] {2}> (s)  p = Mul (x, w) "
        "a = Constant <value = int64[1] {1}> ()  y = ReduceSum <keepdims = 0> (p, a) }"
    )
    message = in_another_process(f"""
        from gateway.errors import LoadError
        from gateway.serving import loader
        from gateway.serving.plan import LoadPlan
        left = loader._memory_bytes() + (10 << 20)
        plan = LoadPlan({str(path)!r}, max_batch_size=2, memory_left_bytes=left)
        print(left)
        try:
            print(loader.load(plan, lambda: None))
        except LoadError as error:
            print(error.message)
    """)
    left, reason = message.split("\n")
    assert reason.startswith("it takes ")
    assert reason.endswith(
        f"bytes of memory and the server has {left} left: raise the server's memory_bytes or serve "
        f"fewer models"
    )


def test_what_its_worker_takes_is_reported_all_of_it(write):
    path = write(
        "(float[n, 5] x) => (float[n, 5] y) { a = Add (x, w)  y = Slice (a, z, f, z) }",
        w=np.zeros((1, 5), np.float32),
        z=np.array([1]),
        f=np.array([5]),
    )
    before, taken = map(
        int,
        in_another_process(f"""
            from gateway.serving import loader
            from gateway.serving.plan import LoadPlan
            print(loader._memory_bytes())
            print(loader.load(LoadPlan({str(path)!r}, max_batch_size=0), lambda: None)
                  .understanding.resident_bytes)
        """).split(),
    )
    assert 4 << 20 < before < taken < 1 << 30


def test_string_arrays_of_files_become_bytes(load):
    spec = load("(string[n] s) => (string[n] t) { t = Identity (s) }").session.inputs[0]
    np.testing.assert_array_equal(
        loader._as_input(spec, np.array([["ü", "b"]])),
        strings.as_array(["ü".encode(), b"b"], (1, 2)),
    )
