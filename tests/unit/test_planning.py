"""From settings to what a worker is told: nothing is lost on the way, and memory is counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgpack
import pytest

from gateway.control import planning
from gateway.control.planning import MemoryBudget, default_threads, load_plan, worker_options
from gateway.serving.options import WorkerOptions
from gateway.serving.plan import Device, Execution, LoadPlan, Understanding
from gateway.settings import Instance, ModelSettings, ServerSettings
from gateway.tensors import Padding

PATH = Path("/models/m/3/model.onnx")


@pytest.fixture
def server(tmp_path):
    """The server's settings, with those given."""

    def make(**settings) -> ServerSettings:
        return ServerSettings(model_repository=tmp_path, **settings)

    return make


@pytest.fixture
def cpus(monkeypatch):
    """Says how many CPUs there are."""

    def set_cpus(count: int) -> None:
        monkeypatch.setattr(planning, "usable_cpus", lambda: count)

    set_cpus(8)
    return set_cpus


ALL_SETTINGS = {
    "max_batch_size": 16,
    "allowed_batch_sizes": [4, 16],
    "accept_batch_effects": True,
    "padding": {
        "length": {"buckets": [8, 16], "side": "left", "values": {"ids": -1, "mask": 0.5}},
        "width": {"buckets": [4]},
    },
    "warmup": False,
    "warmup_samples": "samples.npz",
    "memory_bytes": 1 << 30,
    "session_options": {
        "execution_mode": "parallel",
        "inter_op_threads": 3,
        "graph_optimization": "basic",
        "memory_pattern": False,
        "cpu_arena": False,
        "config": {"session.a": "x", "session.b": True},
    },
    "cache_optimized": True,
}
GPU = {
    "device": "cuda:1",
    "threads": 5,
    "provider_options": {"gpu_mem_limit": 1000},
    "cuda_graphs": True,
}


def through_the_channel(plan: LoadPlan) -> LoadPlan:
    return LoadPlan.from_wire(msgpack.unpackb(msgpack.packb(plan.to_wire())))


def test_every_setting_arrives_in_the_worker(server, cpus, tmp_path):
    settings = ModelSettings.model_validate(ALL_SETTINGS)
    plan = load_plan(
        PATH, settings, server(max_answer_bytes=7 << 20), Instance.model_validate(GPU), 12345
    )
    expected = LoadPlan(
        path=str(PATH),
        execution=Execution(
            device="cuda:1",
            provider_options=(("gpu_mem_limit", "1000"),),
            threads=5,
            inter_op_threads=3,
            execution_mode="parallel",
            graph_optimization="basic",
            memory_pattern=False,
            cpu_arena=False,
            config=(("session.a", "x"), ("session.b", "1")),
            cache_folder=str(tmp_path / ".gateway" / "cache"),
            cuda_graphs=True,
        ),
        max_batch_size=16,
        allowed_batch_sizes=(4, 16),
        accept_batch_effects=True,
        padding=(
            Padding("length", (8, 16), False, (("ids", -1), ("mask", 0.5))),
            Padding("width", (4,), True, ()),
        ),
        warmup=False,
        warmup_samples="/models/m/samples.npz",
        memory_bytes=1 << 30,
        memory_left_bytes=12345,
        max_answer_bytes=7 << 20,
    )
    assert plan == expected
    assert through_the_channel(plan) == expected


def test_the_test_above_leaves_no_field_at_its_default(server, cpus):
    settings = ModelSettings.model_validate(ALL_SETTINGS)
    plan = load_plan(
        PATH, settings, server(max_answer_bytes=7 << 20), Instance.model_validate(GPU), 12345
    )
    for made, default in ((plan, LoadPlan("")), (plan.execution, Execution())):
        for field in dataclasses.fields(made):
            assert getattr(made, field.name) != getattr(default, field.name), field.name


def test_defaults_survive_the_channel_too(server, cpus):
    plan = load_plan(PATH, ModelSettings(), server(), Instance(), 0)
    assert plan.max_batch_size is None
    assert plan.warmup_samples is None
    assert plan.memory_bytes is None
    assert through_the_channel(plan) == plan
    assert through_the_channel(LoadPlan("p")) == LoadPlan("p")


def test_whole_numbers_stay_whole_in_padding(server, cpus):
    settings = ModelSettings.model_validate(
        {"padding": {"length": {"buckets": [8], "values": {"ids": -(1 << 63)}}}}
    )
    plan = through_the_channel(
        load_plan(PATH, settings, server(max_answer_bytes=7 << 20), Instance(), 0)
    )
    ((_, value),) = plan.padding[0].values
    assert (type(value), value) == (int, -(1 << 63))


def test_the_cache_goes_where_the_server_s_settings_say(server, cpus, tmp_path, monkeypatch):
    elsewhere = server(cache_folder=tmp_path / "elsewhere")
    plan = load_plan(PATH, ModelSettings(), elsewhere, Instance(), 0)
    assert plan.execution.cache_folder == str(tmp_path / "elsewhere")
    plan = load_plan(PATH, ModelSettings(cache_optimized=False), elsewhere, Instance(), 0)
    assert plan.execution.cache_folder is None
    monkeypatch.chdir(tmp_path)  # a worker may run elsewhere
    plan = load_plan(PATH, ModelSettings(), server(cache_folder=Path("here")), Instance(), 0)
    assert plan.execution.cache_folder == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("instances", "count", "threads"),
    [
        ([{}], 8, 8),
        ([{"count": 2}], 8, 4),
        ([{"count": 3}], 8, 2),
        ([{"count": 20}], 8, 1),
        ([{"count": 2}, {"count": 2, "threads": 1}], 8, 2),
        ([{"device": "cuda:0", "count": 4}, {"count": 2}], 8, 4),
        ([{"device": "cuda:0", "count": 4}], 8, 8),
        ([{}], 1, 1),
    ],
)
def test_a_model_s_cpu_workers_share_the_cpus(server, cpus, instances, count, threads):
    cpus(count)
    settings = ModelSettings.model_validate({"instances": instances})
    assert default_threads(settings) == threads
    for instance in settings.instances:
        plan = load_plan(PATH, settings, server(), instance, 0)
        assert plan.execution.threads == (instance.threads or threads)


def test_what_a_worker_is_told_besides(server):
    made = server(orphan_grace_s=7, log_level="error", log_format="json")
    settings = ModelSettings(max_queue_delay_us=9)
    options = worker_options(settings, made, Instance(cpus="0-1"), seats=4, seat=3, incarnation=5)
    assert options == WorkerOptions(
        seats=4,
        seat=3,
        incarnation=5,
        cpus="0-1",
        max_queue_delay_us=9,
        orphan_grace_s=7,
        log_level="error",
        log_format="json",
    )


A, B = ("m", 1, 0), ("m", 1, 1)


def test_memory_is_what_is_left_after_all_that_was_taken():
    budget = MemoryBudget(1000)
    assert budget.left_bytes() == 1000
    assert budget.take(A, 300) == 1000
    assert budget.take(B, 200) == 700
    assert budget.left_bytes() == 500
    assert budget.take(A, 450) == 800  # loaded: it takes more than its file
    assert budget.left_bytes() == 350
    budget.give_back(B)
    assert budget.left_bytes() == 550
    budget.give_back(B)
    budget.give_back(("other", 1, 0))
    assert budget.left_bytes() == 550
    budget.give_back(A)
    assert budget.left_bytes() == 1000


def test_less_than_nothing_is_never_left():
    budget = MemoryBudget(1000)
    budget.take(A, 5000)
    assert budget.left_bytes() == 0
    budget.give_back(A)
    assert budget.left_bytes() == 1000


def test_without_a_setting_there_is_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(planning, "usable_memory_bytes", lambda: 777)
    assert MemoryBudget(None).left_bytes() == 777
    assert MemoryBudget(5).left_bytes() == 5


def test_what_was_understood_survives_the_channel():
    understood = Understanding("batches", "in place", ("a note", "another"), 5)
    wire = msgpack.unpackb(msgpack.packb(understood.to_wire()))
    assert Understanding.from_wire(wire) == understood


@pytest.mark.parametrize(
    ("text", "provider", "options"),
    [
        ("cpu", "CPUExecutionProvider", {}),
        ("cuda:1", "CUDAExecutionProvider", {"device_id": "1"}),
        ("OpenVINOExecutionProvider", "OpenVINOExecutionProvider", {}),
    ],
)
def test_a_device_names_its_provider(text, provider, options):
    assert (Device(text).provider, Device(text).own_options) == (provider, options)
