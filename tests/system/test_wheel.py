"""The wheel serves in a new environment that knows nothing of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import requests

from gateway.cli import doctor_facts
from tests.system.server import Server


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(root)], check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"gateway"}
    for kernel in doctor_facts.KERNELS:
        assert any(name.startswith(f"gateway/_kernels/{kernel}.cpython") for name in names)
        assert f"gateway/_kernels/{kernel}.pyi" in names
    assert "gateway/py.typed" in names
    assert not any(name.endswith((".pyx", ".c", ".h")) for name in names)


@pytest.mark.timeout(600)
def test_the_wheel_serves_outside_the_repository(wheel, digits_repository, tmp_path):
    environment = tmp_path / "environment"
    make = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
    subprocess.run(make, check=True, timeout=120)
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--no-compile", f"{wheel}[cpu]"]
    subprocess.run(install, check=True, capture_output=True, timeout=500)
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import gateway; print(gateway.__file__)"],
        cwd=tmp_path, env=outside, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(environment))
    with Server(digits_repository, python=python, cwd=tmp_path) as server:
        body = {"instances": [[[0.0] * 8] * 8]}
        answer = requests.post(f"{server.url}/v1/models/digits:predict", json=body, timeout=10)
        assert answer.status_code == 200
        assert answer.headers["x-model-version"] == "1"
