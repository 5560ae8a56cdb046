"""The way of batches through a GPU, against a CUDA runtime that has none; tests/gpu has the real one."""

from __future__ import annotations

import ctypes
import logging
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import LoadError
from gateway.serving import cuda, geometry, inplace, onnxfile, pipeline
from gateway.serving.devicememory import SMALLEST_AREA_BYTES, Fragment, Workspace
from gateway.serving.pinning import Pins
from gateway.serving.pipeline import DEPTH, Batch, Pipeline
from gateway.serving.plan import Device, Execution
from gateway.serving.samples import Sample
from gateway.serving.session import GPU_FAILED, NO_GRAPH, RunError
from gateway.tensors import DATATYPES, Padding, Signature, TensorSpec
from tests.unit.fakecuda import LOST, NO_MEMORY, UNUSED, FakeCudart, FakeGpuSession
from tests.zoo.building import parse

MODEL = (
    "(float[n, 16] x, int64[n, 2] k) => (float[n, 16] y, float[n] sum, int64[n, 2] m) "
    "{ two = Constant <value = float {2}> ()  axis = Constant <value = int64[1] {1}> () "
    "y = Mul (x, two)  sum = ReduceSum <keepdims = 0> (x, axis)  m = Neg (k) }"
)
VARIABLE = "(float[n, length] x) => (float[n, length] y) { y = Neg (x) }"
DIMS = ((16,), (2,))
SIGNATURE = Signature(
    (
        TensorSpec("x", DATATYPES["FP32"], ("n", 16)),
        TensorSpec("k", DATATYPES["INT64"], ("n", 2)),
    ),
    (TensorSpec("y", DATATYPES["FP32"], ("n", 16)),),
    8,
)


@pytest.fixture(params=["late", "early"])
def cudart(request) -> FakeCudart:
    return FakeCudart(is_late=request.param == "late")


@pytest.fixture
def open_model(tmp_path, cudart):
    """Opens a graph on the fake GPU."""

    def make(graph=MODEL) -> FakeGpuSession:
        path = tmp_path / "model.onnx"
        onnx.save(parse(graph), path)
        return FakeGpuSession(path, onnxfile.examine(path), Execution(), cudart)

    return make


@pytest.fixture
def served(open_model):
    """A pipeline, its session and its signature."""

    def make(graph=MODEL, on_lost=None, **signature):
        session = open_model(graph)
        known = Signature(session.inputs, session.outputs, **{"max_batch_size": 8, **signature})
        made = Pipeline(session, session.gpu, known, on_lost or pytest.fail)
        return SimpleNamespace(pipeline=made, session=session, signature=known)

    return make


class Slot:
    """A slot's two regions, with rows that can be told from all others."""

    def __init__(self, signature, rows, capacity=8, seed=0) -> None:
        self.shape = geometry.shape_of(signature, DIMS, capacity)
        self.inputs = np.full(self.shape.input_bytes, UNUSED, np.uint8)
        self.outputs = np.full(self.shape.output_bytes, UNUSED, np.uint8)
        self.rows = rows
        self.fill(seed)

    def fill(self, seed) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((self.rows, 16), np.float32)
        self.k = rng.integers(-(1 << 62), 1 << 62, (self.rows, 2))
        for p, array in zip(self.shape.inputs, (self.x, self.k), strict=True):
            self.inputs[p.offset : p.offset + array.nbytes] = array.reshape(-1).view(np.uint8)

    @property
    def fragment(self) -> Fragment:
        return Fragment(self.shape, self.rows, self.inputs.ctypes.data, self.outputs.ctypes.data)

    def check(self) -> None:
        """The outputs are those of these rows, and nothing else was written."""
        written = np.zeros(self.outputs.size, bool)
        for p, expected in zip(
            self.shape.outputs, (2 * self.x, self.x.sum(1), -self.k), strict=True
        ):
            begin, end = p.span(0, self.rows)
            got = self.outputs[begin:end].view(expected.dtype).reshape(expected.shape)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
            written[begin:end] = True
        assert (self.outputs[~written] == UNUSED).all()


def batch(*slots, rows=None) -> Batch:
    total = sum(slot.rows for slot in slots)
    return Batch(tuple(slot.fragment for slot in slots), rows or total, tag=slots)


# The runtime


def test_a_call_that_fails_names_itself_its_status_and_leaves_none_behind(cudart):
    gpu = cuda.Gpu(cudart, 0)
    cudart.fails["cudaMalloc"] = NO_MEMORY
    with pytest.raises(cuda.CudaError, match=r"cudaMalloc: error 2 \(2\)") as caught:
        gpu.allocate(1)
    assert caught.value.code == NO_MEMORY
    assert cudart.calls[-1] == ("cudaGetLastError",)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cudaDeviceGetAttribute", lambda gpu: gpu.attribute(1)),
        ("cudaMemcpyAsync", lambda gpu: gpu.copy(1, 2, 3, gpu.copy_in_stream)),
        ("cudaMemsetAsync", lambda gpu: gpu.clear(1, 2, gpu.copy_in_stream)),
        ("cudaHostRegister", lambda gpu: gpu.register(1, 2, 0)),
        ("cudaHostUnregister", lambda gpu: gpu.unregister(1)),
        ("cudaEventCreateWithFlags", lambda gpu: gpu.event()),
        ("cudaEventRecord", lambda gpu: gpu.record(1, gpu.compute_stream)),
        ("cudaEventSynchronize", lambda gpu: gpu.wait_for(1)),
        ("cudaStreamWaitEvent", lambda gpu: gpu.wait_in(gpu.compute_stream, 1)),
        ("cudaStreamSynchronize", lambda gpu: gpu.drain()),
    ],
)
def test_every_status_is_looked_at(cudart, name, call):
    gpu = cuda.Gpu(cudart, 0)
    cudart.fails[name] = 1
    with pytest.raises(cuda.CudaError, match=name):
        call(gpu)


@pytest.mark.parametrize("name", ["cudaSetDevice", "cudaStreamCreateWithFlags"])
def test_a_gpu_that_cannot_be_used_is_an_error_at_once(cudart, name):
    cudart.fails[name] = 100
    with pytest.raises(cuda.CudaError, match=name):
        cuda.Gpu(cudart, 0)
    with pytest.raises(cuda.CudaError, match="cudaSetDevice"):
        cuda.Gpu(cudart, 1)


def test_a_runtime_that_lacks_a_function_is_refused():
    with pytest.raises(cuda.CudaError, match="has no cuda"):
        cuda.Gpu(SimpleNamespace(), 0)


def test_without_a_runtime_the_error_says_what_was_looked_for(monkeypatch):
    monkeypatch.setattr(cuda, "SONAMES", ("libno-such-runtime.so.13",))
    with pytest.raises(cuda.CudaError, match=r"none of libno-such-runtime\.so\.13 is there"):
        cuda.Gpu.open(0)


def test_the_runtime_that_is_loaded_already_is_found():
    line = "7f00-7f01 r-xp 00000000 fe:01 42   {}\n"
    paths = [
        "/a/libcudart.so.13",
        "/b/libcudart-9335f6a2.so.12.4.99",
        "/c/libcudart.so.13 (deleted)",
    ]
    text = "".join(map(line.format, [*paths, "/d/libcudart_static.a", "/e/libcuda.so.1"]))
    assert cuda._LOADED.findall(text) == paths[:2]


@pytest.mark.parametrize(
    ("text", "is_cuda", "options"),
    [("cpu", False, {}), ("cuda:1", True, {"device_id": "1"}), ("XProvider", False, {})],
)
def test_which_devices_are_cudas(text, is_cuda, options):
    device = Device(text)
    assert device.is_cuda == is_cuda
    assert device.own_options == options


# Pinning


@pytest.fixture
def lane():
    spec = geometry.LaneSpec(4, 1024, 2048, 1)
    return SimpleNamespace(spec=spec, inputs_at=0x10000, outputs_at=0x20000)


@pytest.mark.parametrize(
    ("can", "flags"), [(1, cuda.HOST_REGISTER_READ_ONLY), (0, cuda.HOST_REGISTER_DEFAULT)]
)
def test_inputs_are_pinned_as_read_only_where_the_gpu_can(cudart, lane, can, flags):
    cudart.attributes[cuda.ATTRIBUTE_REGISTERS_READ_ONLY] = can
    pins = Pins(cuda.Gpu(cudart, 0))
    pins.pin(lane)
    assert cudart.registered == {0x10000: flags, 0x20000: cuda.HOST_REGISTER_DEFAULT}
    assert ("cudaHostRegister", 0x10000, 4 * 1024, flags) in cudart.calls
    assert ("cudaHostRegister", 0x20000, 4 * 2048, 0) in cudart.calls
    pins.unpin(lane)
    assert cudart.registered == {}


def test_what_cannot_be_pinned_is_said_once_and_not_unpinned(cudart, lane, caplog):
    pins = Pins(cuda.Gpu(cudart, 0))
    for _ in range(2):
        cudart.fails["cudaHostRegister"] = 801  # the first one is that of the inputs
        pins.pin(lane)
        assert cudart.registered == {0x20000: 0}
        pins.unpin(lane)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "inputs cannot be pinned, copies take longer: cudaHostRegister: error 801 (801)"
    ]
    assert cudart.registered == {}


def test_nothing_is_pinned_where_that_is_not_wanted(cudart, lane):
    pins = Pins(cuda.Gpu(cudart, 0), is_wanted=False)
    pins.pin(lane)
    pins.unpin(lane)
    assert cudart.count()["cudaHostRegister"] == 0


# Memory


def test_a_layout_keeps_its_place_while_larger_ones_come(served, cudart):
    signature = served().signature
    workspace = Workspace(cuda.Gpu(cudart, 0))
    rows = [1, 8, 60_000, 3, 200_000]
    layouts = [geometry.shape_of(signature, DIMS, n) for n in rows]
    places = [workspace.place(layout) for layout in layouts]
    assert [workspace.place(layout) for layout in layouts] == places
    assert places[0][0] == places[1][0] == places[3][0]
    sizes = [a[2] for a in cudart.calls if a[0] == "cudaMalloc"]
    assert sizes[0] == SMALLEST_AREA_BYTES
    assert sum(sizes) < 2 * sizes[-1]
    for (inputs_at, outputs_at), layout in zip(places, layouts, strict=True):
        assert inputs_at + layout.input_bytes <= outputs_at
        assert outputs_at % geometry.LINE == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_of_several_slots_lie_one_behind_the_other_and_the_first_is_repeated(
    parts, more, is_late
):
    cudart = FakeCudart(is_late=is_late)
    gpu = cuda.Gpu(cudart, 0)
    workspace = Workspace(gpu)
    slots = [Slot(SIGNATURE, n, capacity=n + i, seed=i) for i, n in enumerate(parts)]
    rows = sum(parts) + more
    layout = geometry.shape_of(SIGNATURE, DIMS, rows)
    workspace.copy_in(layout, [slot.fragment for slot in slots], rows)
    gpu.wait_for(workspace.copied_in)
    at, _ = workspace.place(layout)
    for p, name in zip(layout.inputs, ("x", "k"), strict=True):
        expected = np.concatenate([getattr(slot, name) for slot in slots])
        expected = np.concatenate([expected, *[expected[:1]] * more])
        got = read(at + p.offset, expected.nbytes).view(expected.dtype)
        np.testing.assert_array_equal(got.reshape(expected.shape), expected)


def read(at: int, nbytes: int) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(at, nbytes), np.uint8)


# The pipeline


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_batch_of_any_size_is_answered(served, rows):
    gpu = served()
    slot = Slot(gpu.signature, rows, seed=rows)
    gpu.pipeline.begin(batch(slot))
    assert gpu.pipeline.in_flight == 1
    assert gpu.pipeline.finish().error is None
    assert gpu.pipeline.in_flight == 0
    slot.check()


def test_slots_of_several_lanes_and_padding_make_one_batch(served):
    gpu = served()
    slots = [Slot(gpu.signature, n, capacity, seed=n) for n, capacity in ((1, 8), (2, 4), (3, 3))]
    gpu.pipeline.begin(batch(*slots, rows=8))
    gpu.pipeline.finish()
    for slot in slots:
        slot.check()
    assert gpu.session.graphs == [NO_GRAPH]


def test_batches_in_flight_do_not_mix(served):
    """Slots are used again as soon as they are finished, as front ends do."""
    gpu = served()
    rng = np.random.default_rng(7)
    slots = [Slot(gpu.signature, int(n), seed=int(n)) for n in rng.integers(1, 9, DEPTH + 1)]
    waiting = slots.copy()
    for seed in range(60):
        if gpu.pipeline.is_full or (gpu.pipeline.in_flight and rng.integers(2)):
            (slot,) = gpu.pipeline.finish().tag
            slot.check()
            slot.fill(seed)
            slot.outputs[:] = UNUSED
            waiting.append(slot)
        gpu.pipeline.begin(batch(waiting.pop(0)))


def test_the_next_batch_is_queued_while_the_first_one_runs(served, cudart):
    gpu = served()
    first, second = Slot(gpu.signature, 2, seed=1), Slot(gpu.signature, 3, seed=2)
    gpu.pipeline.begin(batch(first))
    gpu.pipeline.begin(batch(second))
    assert gpu.pipeline.is_full
    assert cudart.count()["cudaEventSynchronize"] == 0
    if cudart.is_late:
        assert (first.outputs == UNUSED).all()  # it does not wait by another way, either
    assert gpu.pipeline.finish().tag == (first,)
    first.check()
    if cudart.is_late:
        assert (second.outputs == UNUSED).all()
    assert gpu.pipeline.finish().tag == (second,)
    second.check()


def test_bindings_are_made_once_for_each_workspace_and_size(served, monkeypatch):
    gpu = served()
    made = []
    bind = gpu.session.bind_on_gpu
    monkeypatch.setattr(gpu.session, "bind_on_gpu", lambda *a: made.append(a) or bind(*a))
    for seed, rows in enumerate([3, 3, 3, 3, 5, 5]):
        slot = Slot(gpu.signature, rows, seed=seed)
        gpu.pipeline.begin(batch(slot))
        gpu.pipeline.finish()
        slot.check()
    assert len(made) == 2 * DEPTH


@pytest.mark.parametrize("name", ["cudaMemcpyAsync", "cudaMalloc", "cudaStreamWaitEvent"])
def test_a_batch_that_cannot_be_queued_fails_alone(served, cudart, name):
    gpu = served()
    good, bad = Slot(gpu.signature, 4, seed=1), Slot(gpu.signature, 2, seed=2)
    gpu.pipeline.begin(batch(good))
    cudart.fails[name] = NO_MEMORY
    with pytest.raises(RunError) as caught:
        gpu.pipeline.begin(batch(bad))
    assert caught.value.public == GPU_FAILED
    assert name in str(caught.value)
    bad.outputs[:] = UNUSED
    gpu.pipeline.begin(batch(bad))  # there was nothing left of it
    for slot in (good, bad):
        assert gpu.pipeline.finish().error is None
        slot.check()


def test_what_the_model_fails_on_is_told_as_on_a_cpu(served):
    gpu = served()
    gpu.session.fails_next = RunError("index 4242 is out of bounds", "ONNX Runtime failed (FAIL)")
    with pytest.raises(RunError) as caught:
        gpu.pipeline.begin(batch(Slot(gpu.signature, 1)))
    assert caught.value.public == "ONNX Runtime failed (FAIL)"
    assert gpu.pipeline.in_flight == 0


def test_what_fails_later_is_that_batchs_error(served, cudart):
    gpu = served()
    first, second = Slot(gpu.signature, 2, seed=1), Slot(gpu.signature, 3, seed=2)
    gpu.pipeline.begin(batch(first))
    gpu.pipeline.begin(batch(second))
    cudart.fails["cudaEventSynchronize"] = 719
    error = gpu.pipeline.finish().error
    assert error is not None
    assert error.public == GPU_FAILED
    assert gpu.pipeline.finish().error is None
    second.check()


@pytest.mark.parametrize("when", ["begin", "finish"])
def test_a_gpu_that_is_lost_ends_the_worker(served, cudart, when, caplog):
    lost = []
    gpu = served(on_lost=lambda: lost.append(True))
    gpu.pipeline.begin(batch(Slot(gpu.signature, 2)))
    for name in ("cudaMemcpyAsync", "cudaEventSynchronize", "cudaStreamSynchronize"):
        cudart.fails["always:" + name] = LOST
    cudart.fails["always:cudaDeviceSynchronize"] = LOST
    if when == "begin":
        with pytest.raises(RunError):
            gpu.pipeline.begin(batch(Slot(gpu.signature, 2)))
    else:
        assert gpu.pipeline.finish().error is not None
    assert lost == [True]
    assert "which ends" in caplog.text


def test_when_the_next_batch_is_due_follows_how_long_they_take(served, monkeypatch):
    """The shortest of recent runs counts: nobody waits for the estimate where the answer is there."""
    gpu = served()
    now_ns = 0
    monkeypatch.setattr(pipeline, "monotonic_ns", lambda: now_ns)
    gpu.pipeline._idle = type(gpu.pipeline._idle)([gpu.pipeline._idle[0]])  # the same one each time
    assert gpu.pipeline.due_ns() == 0
    slot = Slot(gpu.signature, 3)
    for took_ns in (90_000, 4_000, 5_000, 70_000):
        now_ns += 1_000_000
        gpu.pipeline.begin(batch(slot))
        assert gpu.pipeline.due_ns() == 0  # too little is known
        now_ns += took_ns
        gpu.pipeline.finish()
    now_ns += 1_000_000
    gpu.pipeline.begin(batch(slot))
    assert gpu.pipeline.due_ns() == now_ns + 4_000
    gpu.pipeline.finish()


# CUDA graphs


def test_a_graph_belongs_to_a_workspace_and_a_size(served):
    gpu = served(allowed_batch_sizes=(2, 8))
    assert gpu.pipeline.capture_graphs() == 2 * DEPTH
    assert sorted(gpu.session.graphs) == [1, 2, 3, 4]
    captured = list(gpu.session.graphs)
    gpu.session.graphs.clear()
    for seed, rows in enumerate([2, 8, 2, 8, 8, 2]):
        slot = Slot(gpu.signature, rows - 1, seed=seed)
        gpu.pipeline.begin(batch(slot, rows=rows))
        gpu.pipeline.finish()
        slot.check()
    used = gpu.session.graphs
    assert set(used) <= set(captured)
    assert used[0] != used[2] or used[0] != used[5]
    gpu.pipeline.begin(batch(Slot(gpu.signature, 5), rows=5))  # not a size that was captured
    gpu.pipeline.finish()
    assert used[-1] == NO_GRAPH


def test_every_bucket_has_its_graphs(served):
    gpu = served(
        VARIABLE,
        max_batch_size=4,
        allowed_batch_sizes=(1, 4),
        padding=(Padding("length", (8, 16), True, ()),),
    )
    assert gpu.pipeline.capture_graphs() == 2 * 2 * DEPTH


@pytest.mark.parametrize("sizes", [(), (1, 4)])
def test_without_sizes_and_fixed_dims_there_are_no_graphs(served, sizes):
    gpu = served(VARIABLE, max_batch_size=4, allowed_batch_sizes=sizes)
    assert gpu.pipeline.capture_graphs() == 0
    assert gpu.session.graphs == []


def test_graphs_are_bounded(served, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_GRAPHS", 3)
    gpu = served(allowed_batch_sizes=(1, 2, 4, 8))
    assert gpu.pipeline.capture_graphs() == 3


def test_a_model_that_cannot_be_captured_is_refused(served):
    gpu = served(allowed_batch_sizes=(1, 8))
    gpu.session.fails_next = RunError("operation not permitted when stream is capturing")
    with pytest.raises(LoadError, match="CUDA graphs cannot be captured") as caught:
        gpu.pipeline.capture_graphs()
    assert "capturing" in caught.value.detail


# What the loader looks at


def test_a_run_that_is_waited_for_goes_through_the_gpus_memory(open_model):
    session = open_model()
    signature = Signature(session.inputs, session.outputs, 8)
    slot = Slot(signature, 8)
    shape = slot.shape
    for seed in range(3):
        slot.fill(seed)
        slot.outputs[:] = UNUSED
        part = slot.fragment
        session.run(session.bind(shape, 8, part.inputs_at, part.outputs_at))
        slot.check()


def test_an_output_that_is_not_written_on_the_gpu_is_found(open_model):
    """What lay in its place in the GPU's memory must not count as written."""
    session = open_model("(float[n, 4] x) => (float[n, 4] x, float[n, 4] y) { y = Neg (x) }")
    signature = Signature(session.inputs, session.outputs, 8)
    sample = Sample(session.inputs, ((4,),), "random", True)
    why = inplace.why_not(session, signature, SimpleNamespace(ops=frozenset()), sample)
    assert why == "output 'x' is not written where it is bound"


def test_a_failing_gpu_is_a_run_error(open_model, cudart):
    session = open_model()
    slot = Slot(Signature(session.inputs, session.outputs, 8), 8)
    part = slot.fragment
    bound = session.bind(slot.shape, 8, part.inputs_at, part.outputs_at)
    cudart.fails["cudaMemcpyAsync"] = 1
    with pytest.raises(RunError) as caught:
        session.run(bound)
    assert caught.value.public == GPU_FAILED
