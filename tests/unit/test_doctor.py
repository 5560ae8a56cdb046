"""``gateway doctor``: what it makes of plain values, and what it sees of folders."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from gateway.cli import doctor, doctor_facts, doctor_findings
from gateway.cli.doctor_facts import Devices, Facts, Kernels, Limits, Runtime
from gateway.cli.doctor_findings import Finding
from gateway.control import inspection
from gateway.control.inspection import Load, Survey
from gateway.control.repository import ModelEntry
from gateway.serving.plan import Understanding
from gateway.settings import ModelSettings
from gateway.tensors import DATATYPES, Padding, Signature, TensorSpec

GIB = 1 << 30

SOUND = Facts(
    Runtime(
        gateway="1.0",
        python="CPython 3.11.0",
        system="Linux 6.1 x86_64",
        onnxruntime="1.32.0",
        onnxruntime_error=None,
        onnxruntime_distributions=["onnxruntime 1.32.0"],
        execution_providers=["CPUExecutionProvider"],
        execution_devices=["CPUExecutionProvider: CPU"],
        aiohttp="3.14.4",
        aiohttp_c_parser=True,
        uvloop="0.21",
    ),
    Kernels("release", 2, "/gateway/_kernels", None),
    Limits(
        open_files_soft=65536,
        open_files_hard=65536,
        cpus_usable=4,
        cpus_affinity=4,
        cpus_machine=4,
        memory_usable_bytes=8 * GIB,
        memory_machine_bytes=8 * GIB,
        memfd_sealing=True,
        pidfd=True,
    ),
    Devices("A CPU", ["avx2"], []),
)


def changed(part: str, **values: object) -> Facts:
    return replace(SOUND, **{part: replace(getattr(SOUND, part), **values)})


def of_installation(facts: Facts) -> list[Finding]:
    return list(doctor_findings.of_installation(facts))


def spec(name: str, shape: tuple | None, datatype: str = "FP32", optional: bool = False):
    return TensorSpec(name, DATATYPES[datatype], shape, optional)


def loaded(
    *tensors: TensorSpec,
    batching: str = "one request at a time: because",
    outputs: str = "written in place by ONNX Runtime",
    size: int = 0,
    resident_bytes: int = 1 << 20,
    version: int = 1,
    threads: int = 1,
    **settings: object,
) -> Load:
    """A model of these inputs; its last tensor is the output."""
    made = ModelSettings.model_validate(settings)
    *inputs, output = tensors or (spec("x", ("n", 2)), spec("y", ("n", 2)))
    return Load(
        ModelEntry("m", made, (), []),
        version,
        made.instances[0],
        threads,
        1.0,
        Signature(tuple(inputs), (output,), size),
        Understanding(batching, outputs, (), resident_bytes),
    )


def of_loads(*loads: Load, budget_bytes: int | None = None) -> list[Finding]:
    return list(doctor_findings.of_loads(loads, SOUND.limits, budget_bytes))


def test_a_sound_installation_has_no_findings():
    assert of_installation(SOUND) == []


@pytest.mark.parametrize(
    ("facts", "severity", "problem", "advice"),
    [
        (
            changed("runtime", onnxruntime_distributions=["onnxruntime 1", "onnxruntime-gpu 1"]),
            "error",
            "onnxruntime 1 and onnxruntime-gpu 1",
            "uninstall them all",
        ),
        (
            changed(
                "runtime",
                onnxruntime=None,
                onnxruntime_error="No module named 'onnxruntime'",
                onnxruntime_distributions=[],
            ),
            "error",
            "not installed",
            "inference-gateway[cpu]",
        ),
        (
            changed("runtime", onnxruntime=None, onnxruntime_error="libcudart.so.13 not found"),
            "error",
            "libcudart.so.13",
            "install it again",
        ),
        (changed("runtime", aiohttp_c_parser=False), "warning", "Python", "AIOHTTP_NO_EXTENSIONS"),
        (changed("runtime", aiohttp=None, aiohttp_c_parser=False), "error", "aiohttp", "install"),
        (changed("runtime", uvloop=None), "error", "uvloop", "install"),
        (changed("kernels", build="debug"), "warning", "debug build", "GATEWAY_CYTHON_DEBUG"),
        (
            changed("kernels", build=None, layout=None, error="no ring"),
            "error",
            "no ring",
            "install the gateway again",
        ),
        (changed("limits", open_files_soft=4095), "warning", "4095 files", "at most 65536"),
        (
            changed("limits", open_files_soft=1024, open_files_hard=None),
            "warning",
            "1024 files",
            "before the start, or",
        ),
        (changed("limits", memfd_sealing=False), "error", "memfds", "seccomp"),
        (changed("limits", pidfd=False), "error", "pidfd_open", "kernel"),
        (changed("devices", nvidia=["NVIDIA H100"]), "note", "GPU", "inference-gateway[gpu]"),
        (changed("devices", cpu_features=[]), "note", "AVX2", "machine type"),
    ],
)
def test_each_problem_of_an_installation_is_one_finding(facts, severity, problem, advice):
    (finding,) = of_installation(facts)
    assert finding.severity == severity
    assert problem in finding.problem
    assert advice in finding.advice


@pytest.mark.parametrize(
    "facts",
    [
        changed("limits", open_files_soft=4096),
        changed("limits", open_files_soft=None, open_files_hard=None),
        replace(
            changed("runtime", execution_providers=["CUDAExecutionProvider"]),
            devices=Devices("A CPU", ["avx2"], ["NVIDIA H100"]),
        ),
        replace(
            changed("runtime", system="Linux 6.1 aarch64"), devices=Devices("ARM", ["asimd"], [])
        ),
    ],
)
def test_what_is_no_problem_is_no_finding(facts):
    assert of_installation(facts) == []


# Models


@pytest.mark.parametrize(
    ("tensors", "batching", "advice"),
    [
        ([spec("x", (1, 3)), spec("y", (1, 3))], "", "dynamic batch axis"),
        ([spec("x", None), spec("y", ("n", 3))], "", "dynamic batch axis"),
        ([spec("x", ()), spec("y", ())], "", "dynamic batch axis"),
        ([spec("x", ("a", 3)), spec("y", ("b", 3))], "", "set max_batch_size"),
        ([spec("x", (None, 3)), spec("y", (None, 3))], "", "one name for all"),
        ([spec("x", ("n", "n")), spec("y", ("n", 3))], "", "another name"),
        (
            [spec("x", ("n", 3)), spec("y", ("n", 3))],
            "… (accept_batch_effects would batch them all the same)",
            "accept_batch_effects: true",
        ),
        ([spec("x", ("n", 3)), spec("y", ("n", 3))], "no made-up input ran", "not tested"),
        ([spec("x", ("n", 3)), spec("y", ("n", 3))], "it does not run on …", "any number of rows"),
    ],
)
def test_a_model_that_is_not_batched_comes_with_its_own_advice(tensors, batching, advice):
    (finding,) = of_loads(loaded(*tensors, batching=f"one request at a time: {batching}"))
    assert finding.severity == "warning"
    assert finding.about == "m version 1"
    assert finding.problem == f"served one request at a time: {batching}"
    assert advice in finding.advice


@pytest.mark.parametrize(
    "load",
    [
        loaded(max_batch_size=0),
        loaded(spec("x", (), optional=True), spec("y", (3,))),
        loaded(spec("x", ("n", 3)), spec("y", ("n", 3)), size=64),
        loaded(
            spec("x", ("n", 3)), spec("o", ("length",), optional=True), spec("y", ("n",)), size=8
        ),
    ],
)
def test_a_model_that_is_well_or_cannot_be_helped_has_no_findings(load):
    assert of_loads(load) == []


@pytest.mark.parametrize("dim", ["seq", "past + 1", "no", "a: b", "Ω", "1", "null"])
def test_the_padding_example_is_a_setting_that_works(dim):
    load = loaded(spec("x", ("n", dim)), spec("y", ("n", dim)), size=64)
    (finding,) = of_loads(load)
    assert finding.severity == "note"
    assert f"'{dim}'" in finding.problem
    example = finding.advice.partition("config.yaml: ")[2]
    settings = ModelSettings.model_validate(yaml.safe_load(example))
    assert list(settings.padding) == [dim]
    padding = (Padding(dim, settings.padding[dim].buckets, True, ()),)
    padded = replace(load, signature=replace(load.signature, padding=padding))
    assert of_loads(padded) == []


def test_many_dims_are_not_all_listed():
    dims = tuple(f"d{i}" for i in range(9))
    (finding,) = of_loads(loaded(spec("x", ("n", *dims[:7])), spec("y", ("n",)), size=8))
    assert "'d3' and 3 more" in finding.problem
    assert "d4" not in finding.problem + finding.advice


def test_dims_of_strings_are_not_padded():
    texts = spec("x", ("n", "k"), "BYTES"), spec("y", ("n",))
    assert (
        of_loads(loaded(*texts, outputs="copied after each run: 'x' holds strings", size=8)) == []
    )


def test_outputs_that_are_copied_are_told():
    (finding,) = of_loads(loaded(outputs="copied after each run: why", size=8))
    assert (finding.severity, finding.problem) == (
        "note",
        "its outputs are copied after each run: why",
    )


def test_a_failed_load_is_an_error_that_names_the_kind_of_worker():
    kinds = [{"device": "cuda:0"}, {}]
    failed = replace(loaded(instances=kinds), signature=None, understanding=None, reason="broken")
    (finding,) = of_loads(failed)
    assert (finding.severity, finding.about) == ("error", "m version 1 on cuda:0")
    assert finding.problem == "broken"
    assert "dmesg" not in finding.advice
    (finding,) = of_loads(replace(failed, reason="the worker was killed by SIGKILL while loading"))
    assert "dmesg" in finding.advice


def test_threads_beyond_the_cpus():
    fitting = loaded(size=8, threads=2, instances=[{"count": 2}])
    assert of_loads(fitting) == []
    (finding,) = of_loads(replace(fitting, threads=3))
    assert (finding.severity, finding.about) == ("warning", "m version 1")
    assert "6 threads" in finding.problem
    assert "4 CPUs are usable" in finding.problem
    (finding,) = of_loads(fitting, replace(fitting, version=2))
    assert (finding.severity, finding.about) == ("note", "machine")
    assert "8 threads" in finding.problem
    on_gpu = loaded(size=8, threads=9, instances=[{"device": "cuda:0"}])
    assert of_loads(on_gpu) == []


def test_memory_of_all_workers_beyond_the_budget():
    large = loaded(size=8, resident_bytes=3 * GIB, instances=[{"count": 2}])
    assert of_loads(large) == []
    (finding,) = of_loads(large, budget_bytes=6 * GIB - 1)
    assert finding.severity == "error"
    assert "take 6.0 GiB" in finding.problem
    (finding,) = of_loads(large, budget_bytes=9 * GIB)
    assert finding.severity == "warning"
    assert "9.0 GiB" in finding.problem


def test_numbers_of_bytes():
    assert [doctor_findings.in_bytes(n) for n in (0, 1023, 1024, 1 << 20, 3 << 29)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.0 MiB",
        "1.5 GiB",
    ]


# Folders


def write(repository: Path, *files: str) -> Path:
    for name in files:
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return repository


def test_a_survey_sees_all_that_a_start_would_stumble_over(tmp_path):
    repository = write(
        tmp_path / "models",
        *(
            "a/1/model.onnx",
            "a/2/model.onnx",
            "a/02/model.onnx",
            "b/1/model.onnx",
            "c/1/model.onnx",
        ),
        *("no name/1/model.onnx", ".hidden/1/model.onnx", "README", "z/1/model.onnx"),
    )
    (repository / "empty").mkdir()
    (repository / "away").symlink_to("/")
    (repository / "b/config.yaml").write_text("max_batch: 1")
    (repository / "c/config.yaml").write_text("version_policy: {specific: [7]}")
    found = inspection.survey(repository)
    assert [(entry.name, v.version) for entry, v in found.chosen] == [("a", 2), ("z", 1)]
    wrong, absent = found.errors
    assert "'b': unknown key 'max_batch'" in wrong
    assert "no usable version 7" in absent
    version, away, no_name = found.ignored
    assert version.startswith("model 'a': version folder '02': not a version")
    assert away == "'away': not a folder in the model repository"
    assert no_name == "'no name': not a model name"
    findings = list(doctor_findings.of_repository(found))
    assert [(f.severity, f.about) for f in findings] == [
        ("error", "repository"),
        ("error", "repository"),
        ("warning", "empty"),
    ]


def test_a_repository_without_models_is_an_error(tmp_path):
    (finding,) = doctor_findings.of_repository(inspection.survey(tmp_path))
    assert finding.severity == "error"
    assert "<model>/<version>/model.onnx" in finding.advice


def test_a_repository_that_cannot_be_read_is_an_error_without_its_path(tmp_path):
    (finding,) = doctor_findings.of_repository(inspection.survey(tmp_path / "absent"))
    assert finding.severity == "error"
    assert "No such file or directory" in finding.problem
    assert str(tmp_path) not in finding.problem


def test_gpus_are_named_as_the_driver_lists_them(tmp_path):
    write(tmp_path, "0000:01:00.0/information", "0000:02:00.0/other")
    (tmp_path / "0000:01:00.0/information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    assert doctor_facts._nvidia(tmp_path) == ["NVIDIA H100", "0000:02:00.0"]
    assert doctor_facts._nvidia(tmp_path / "absent") == []


# The screen


def screen(report: doctor.Report, columns: int = 100) -> str:
    file = io.StringIO()
    doctor.show(report, Console(file=file, width=columns, highlight=False))
    return file.getvalue()


def test_a_screen_without_problems_says_so():
    report = doctor.Report(SOUND, None, Survey((), (), (), ()), (), ())
    text = screen(report)
    assert text.endswith("\nNo problems found.\n")
    assert "Models" not in text
    assert not report.has_errors


@pytest.mark.parametrize("columns", [100, 60])
def test_a_screen_keeps_to_its_width_and_escapes_what_files_say(columns):
    evil = "\x1b[31mred\x07 [bold]" + "long " * 40 + "y" * 150
    load = loaded(spec("x", (evil, 3)), spec(evil, (2, None), "INT64", True), spec("y", None))
    failed = replace(load, signature=None, understanding=None, reason=evil, detail=evil)
    findings = (Finding("error", evil, evil, evil),)
    survey = Survey((), (), (), (evil,))
    text = screen(doctor.Report(SOUND, Path("models"), survey, (load, failed), findings), columns)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert max(map(len, text.split("\n"))) <= columns
    assert text.count(r"\x1b[31mred") >= 7
    assert "[bold]" in text
    assert "of any rank" in text
    assert "Findings: 1 error\n" in text
    assert not any(line.endswith(" ") for line in text.split("\n"))
