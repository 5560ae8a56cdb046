"""A real GPU's answers: those of a CPU at every batch size, whatever else is in flight."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.serving.cuda import CudaError
from gateway.serving.pinning import Pins
from gateway.serving.pipeline import Batch
from gateway.serving.samples import Sample
from tests.gpu.lanes import Lane

SIZES = (1, 2, 8, 32)


def arrays_of(served, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    made = Sample(served.signature.inputs, Lane(served.signature, 1).shape.dims, "random", True)
    found = made.arrays(rows)
    rng = np.random.default_rng(seed)
    return {
        name: (array * rng.uniform(0.5, 2, (rows, *(1 for _ in array.shape[1:])))).astype(
            array.dtype
        )
        for name, array in found.items()
    }


def check(served, lane: Lane, slot: int, arrays: dict[str, np.ndarray]) -> None:
    rows = len(next(iter(arrays.values())))
    expected = served.cpu.run_arrays(arrays)
    for got, want in zip(lane.answers(slot, rows), expected, strict=True):
        if want.dtype.kind == "f":
            scale = max(1e-6, float(np.abs(want.astype(np.float64)).max()))
            np.testing.assert_allclose(got / scale, want / scale, atol=2e-3)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "unpinned"])
@pytest.mark.parametrize("name", ["echo", "mlp784", "multi", "encoder"])
def test_answers_are_the_cpus_at_every_size(served, name, is_pinned):
    on = served(name)
    lane, pins = Lane(on.signature), Pins(on.gpu.gpu, is_wanted=is_pinned)
    pins.pin(lane)
    for rows in range(1, on.signature.max_batch_size + 1):
        arrays = arrays_of(on, rows, seed=rows)
        on.pipeline.begin(Batch((lane.fill(rows % 8, arrays),), rows))
        assert on.pipeline.finish().error is None
        check(on, lane, rows % 8, arrays)
    pins.unpin(lane)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "unpinned"])
def test_batches_that_overlap_do_not_mix(served, is_pinned, graphs):
    on = served("encoder", sizes=SIZES, graphs=graphs)
    lane, pins = Lane(on.signature), Pins(on.gpu.gpu, is_wanted=is_pinned)
    pins.pin(lane)
    rng = np.random.default_rng(3)
    in_slot: dict[int, dict[str, np.ndarray]] = {}
    for turn in range(60):
        if on.pipeline.is_full:
            finished = on.pipeline.finish()
            assert finished.error is None
            check(on, lane, finished.tag, in_slot[finished.tag])
        slot, rows = turn % 8, int(rng.integers(1, 33))
        in_slot[slot] = arrays_of(on, rows, seed=turn)
        padded = next(size for size in SIZES if size >= rows)
        on.pipeline.begin(Batch((lane.fill(slot, in_slot[slot]),), padded, slot))
    while on.pipeline.in_flight:
        finished = on.pipeline.finish()
        check(on, lane, finished.tag, in_slot[finished.tag])
    pins.unpin(lane)


def test_slots_of_several_lanes_are_one_batch(served):
    on = served("mlp784")
    lanes = [Lane(on.signature), Lane(on.signature), Lane(on.signature)]
    arrays = [arrays_of(on, rows, seed=rows) for rows in (3, 1, 7)]
    parts = tuple(lane.fill(2, one) for lane, one in zip(lanes, arrays, strict=True))
    on.pipeline.begin(Batch(parts, 16))
    assert on.pipeline.finish().error is None
    for lane, one in zip(lanes, arrays, strict=True):
        check(on, lane, 2, one)


def test_graphs_answer_as_runs_without_them_do(served):
    plain, graphs = served("mlp784", sizes=SIZES), served("mlp784", sizes=SIZES, graphs=True)
    lane = Lane(plain.signature)
    for rows in SIZES:
        arrays, got = arrays_of(plain, rows), []
        for on in (plain, graphs):
            on.pipeline.begin(Batch((lane.fill(0, arrays),), rows))
            assert on.pipeline.finish().error is None
            got.append(lane.answers(0, rows)[0])
        np.testing.assert_allclose(*got, atol=1e-5)


def test_memory_that_the_gpu_does_not_have_leaves_it_working(served):
    on = served("mlp784")
    lane = Lane(on.signature)
    arrays = arrays_of(on, 4)
    on.pipeline.begin(Batch((lane.fill(0, arrays),), 4))
    on.pipeline.finish()
    with pytest.raises(CudaError, match="cudaMalloc"):
        on.gpu.gpu.allocate(1 << 50)
    on.pipeline.begin(Batch((lane.fill(0, arrays),), 4))
    assert on.pipeline.finish().error is None
    check(on, lane, 0, arrays)


def test_a_run_that_is_waited_for_is_the_cpus_too(served):
    on = served("multi")
    lane = Lane(on.signature)
    for seed in range(3):
        arrays = arrays_of(on, 5, seed)
        part = lane.fill(1, arrays)
        on.gpu.run(on.gpu.bind(lane.shape, 5, part.inputs_at, part.outputs_at))
        check(on, lane, 1, arrays)
