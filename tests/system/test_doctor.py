"""``gateway doctor`` on real models: what it says is true, its status tells, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gateway.cli import doctor_facts
from gateway.control import inspection
from gateway.settings import load_server_settings
from tests.system.server import command_line, wait_gone
from tests.zoo.building import MODEL_FILE, writer
from tests.zoo.hostile import all_hostile

DEADLINE_S = 100

PRIVATE = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "AIOHTTP_NO_EXTENSIONS"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gateway", "doctor", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in PRIVATE}
    return kept | {"PYTHONIOENCODING": "utf-8", **more}


def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a session of its own, of which nothing may be left when it ends."""
    with subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**env),
        start_new_session=True,
    ) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert session(process.pid) == []
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def session(leader: int) -> list[int]:
    """The processes of a session; those that ended and only wait for init to reap them are none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[3]) == leader and after_name[0] != "Z":
            found.append(int(folder.name))
    return found


def put(repository: Path, name: str, write, config: str = "") -> None:
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    write(folder)
    if config:
        (folder.parent / "config.yaml").write_text(config)


def hostile(name: str):
    return next(model for model in all_hostile() if model.name == name).write


WHOLE = writer("(float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }")
MIXING = writer(
    "(float[n, 3] x) => (float[n, 3] y) { m = ReduceMean <keepdims = 1> (x)  y = Sub (x, m) }"
)
UNKNOWN = writer("(float[n, k] x) => (float[n, j] y) { y = Relu (x) }")


@pytest.fixture(scope="module")
def repository(tmp_path_factory, digits_repository) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(digits_repository / "digits", folder / "digits")
    put(folder, "whole", WHOLE)
    put(folder, "mixing", MIXING)
    put(folder, "unknown", UNKNOWN, "instances: [{count: 2, threads: 1}]")
    put(folder, "crash", hostile("crash"))
    put(folder, "broken", lambda version: (version / MODEL_FILE).write_bytes(b"no model"))
    put(folder, "misspelt", WHOLE, "max_batch: 3")
    (folder / "whole" / "one").mkdir()
    return folder


@pytest.fixture(scope="module")
def report(repository) -> dict:
    done = run(repository, "--json")
    assert done.returncode == 1, done.stdout
    assert done.stderr == ""
    return json.loads(done.stdout)


def of(report: dict, model: str, version: int = 1) -> dict:
    (found,) = (m for m in report["models"] if (m["model"], m["version"]) == (model, version))
    return found


def findings(report: dict, about: str) -> list[tuple[str, str]]:
    return [(f["severity"], f["problem"]) for f in report["findings"] if f["about"] == about]


def test_every_version_that_is_served_is_loaded(report):
    names = [(m["model"], m["version"]) for m in report["models"]]
    assert names == [
        ("broken", 1), ("crash", 1), ("digits", 1), ("digits", 2), ("digits", 3),
        ("mixing", 1), ("unknown", 1), ("whole", 1),
    ]  # fmt: skip
    digits = of(report, "digits")
    assert digits["state"] == "loaded"
    assert digits["inputs"] == [
        {"name": "image", "datatype": "FP32", "shape": ["batch", 8, 8], "optional": False}
    ]
    assert [output["name"] for output in digits["outputs"]] == ["probabilities", "label"]
    assert digits["max_batch_size"] == 64
    assert digits["batching"] == "batches of up to 64 rows: its settings say so"
    assert digits["memory_bytes"] > 1 << 16
    assert digits["seconds"] > 0
    assert (digits["device"], digits["workers"]) == ("cpu", 1)
    assert (of(report, "unknown")["workers"], of(report, "unknown")["threads"]) == (2, 1)


def test_models_that_do_not_load_are_errors_with_their_reason(report):
    broken, crash = of(report, "broken"), of(report, "crash")
    assert (broken["state"], broken["memory_bytes"]) == ("failed", None)
    assert findings(report, "broken version 1") == [("error", broken["reason"])]
    assert re.fullmatch("the worker was killed by SIG[A-Z]+ while loading it", crash["reason"])
    assert findings(report, "crash version 1") == [("error", crash["reason"])]


def test_settings_that_cannot_be_read_hide_no_other_model(report):
    ((severity, problem),) = findings(report, "repository")
    assert severity == "error"
    assert "'misspelt': unknown key 'max_batch' (did you mean 'max_batch_size'?)" in problem
    assert report["ok"] is False


def test_models_that_are_not_batched_get_advice(report):
    ((severity, problem),) = findings(report, "whole version 1")
    assert severity == "warning"
    assert problem == f"served {of(report, 'whole')['batching']}"
    (advice,) = (f["advice"] for f in report["findings"] if f["about"] == "mixing version 1")
    assert "accept_batch_effects: true" in advice


def test_padding_and_copied_outputs_are_notes(report):
    padding, outputs = findings(report, "unknown version 1")
    assert padding == ("note", "requests that differ in 'k' do not share batches")
    assert outputs == ("note", f"its outputs are {of(report, 'unknown')['output_transport']}")


def test_ignored_folders_come_with_the_reason(report):
    (ignored,) = report["ignored"]
    assert ignored.startswith("model 'whole': version folder 'one': not a version")


def test_installation_and_machine_are_told(report):
    runtime, limits = report["runtime"], report["limits"]
    assert runtime["onnxruntime_distributions"] == [f"onnxruntime {runtime['onnxruntime']}"]
    assert "CPUExecutionProvider" in runtime["execution_providers"]
    assert runtime["aiohttp_c_parser"] is True
    assert report["kernels"]["build"] == "release"
    assert limits["memfd_sealing"] is True
    assert limits["pidfd"] is True
    assert set(report) == {
        "ok", "runtime", "kernels", "limits", "devices", "repository", "models", "ignored", "findings",
    }  # fmt: skip


def test_the_screen_says_the_same(repository, report):
    done = run(repository)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.split("\n")
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in done.stdout
    for model in report["models"]:
        name = f"  {model['model']} version {model['version']}  "
        (line,) = (line for line in lines if line.startswith(name))
        assert ("FAILED" in line) == (model["state"] == "failed")
    assert "    inputs     image FP32 [batch, 8, 8]" in lines
    assert re.search("^Findings: 3 errors, ", done.stdout, re.MULTILINE)
    assert done.stdout.count("→ ") == len(report["findings"])


def test_a_good_repository_is_success(digits_repository):
    done = run(digits_repository, "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ok"] is True


def test_without_a_repository_no_model_is_looked_at():
    done = run()
    assert done.returncode == 0, done.stdout
    assert "Models" not in done.stdout


def test_without_onnxruntime_everything_else_is_still_told(tmp_path, repository):
    error = "raise ModuleNotFoundError(\"No module named 'onnxruntime'\")"
    (tmp_path / "onnxruntime.py").write_text(error)
    done = run(repository, "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["models"] == []
    assert told["kernels"]["build"] == "release"
    assert any("models were not loaded" in f["problem"] for f in told["findings"])
    assert len(findings(told, "repository")) == 1


def test_without_kernels_everything_else_is_still_told(digits_repository, run_python):
    told = json.loads(
        run_python(
            "import sys; sys.modules['gateway._kernels.ring'] = None\n"
            "from pathlib import Path; from gateway.cli import doctor\n"
            f"doctor.run(Path({str(digits_repository)!r}), None, is_json=True)"
        )
    )
    assert told["ok"] is False
    assert told["kernels"]["build"] is None
    assert told["models"] == []
    assert told["runtime"]["uvloop"]
    assert any("kernels do not load" in f["problem"] for f in told["findings"])


def test_settings_of_the_server_count(tmp_path, repository):
    config = tmp_path / "server.yaml"
    config.write_text("no_such_setting: 1")
    done = run(repository, "--json", "--config", config)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["models"] == []
    ((severity, problem),) = findings(told, "settings")
    assert severity == "error"
    assert "no_such_setting" in problem


def test_a_load_without_end_is_ended(tmp_path):
    put(tmp_path, "endless", hostile("endless_loop"))
    done = run(tmp_path, "--json", GATEWAY_LOAD_TIMEOUT_S="3")
    assert done.returncode == 1
    assert "load_timeout_s (3 s)" in of(json.loads(done.stdout), "endless")["reason"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_doctor_that_is_stopped_ends_its_worker(tmp_path, number):
    put(tmp_path, "endless", hostile("endless_loop"))
    with subprocess.Popen(
        command(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    ) as process:
        worker = wait_worker(process.pid)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) != 0
    wait_gone(worker)
    assert session(process.pid) == []


def wait_worker(leader: int) -> int:
    """The worker of a session, once there is one."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for pid in session(leader):
            if "endless/1#doctor" in command_line(pid):
                return pid
    raise AssertionError("no worker was started")


def test_nothing_is_written_and_no_descriptor_is_left(tmp_path):
    large = np.zeros((600, 600), np.float32)  # its optimised graph would be kept
    put(
        tmp_path,
        "large",
        writer("(float[n, 600] x) => (float[n, 600] y) { y = MatMul (x, w) }", w=large),
    )
    put(tmp_path, "broken", lambda version: (version / MODEL_FILE).write_bytes(b"no model"))
    server = load_server_settings(model_repository=tmp_path)
    files = sorted(tmp_path.rglob("*"))
    found = inspection.survey(tmp_path)
    descriptors = sorted(os.listdir("/proc/self/fd"))
    loads = [
        inspection.load(entry, version, entry.settings.instances[0], server)
        for entry, version in found.chosen
    ]
    assert [load.understanding is not None for load in loads] == [False, True]
    assert doctor_facts.collect().limits.memfd_sealing
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert sorted(tmp_path.rglob("*")) == files
