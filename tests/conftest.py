"""What all tests share: the models made by script, and the repository's own root on the path."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("gateway", deadline=None)
hypothesis.settings.load_profile("gateway")

ROOT = Path(__file__).resolve().parent.parent


def load_script(path: Path):
    """Import a script that is part of no package."""
    name = "_script_" + path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def benchmark_models():
    """The module benchmarks/models.py."""
    return load_script(ROOT / "benchmarks" / "models.py")


@pytest.fixture(scope="session")
def make_repository(tmp_path_factory, benchmark_models):
    """A model repository with the named models of benchmarks/models.py."""

    def make(*names: str, **configs: str) -> Path:
        folder = tmp_path_factory.mktemp("repository")
        benchmark_models.write_repository(folder, list(names))
        for name, config in configs.items():
            (folder / name / "config.yaml").write_text(config)
        return folder

    return make


@pytest.fixture(scope="module")
def digits_repository(tmp_path_factory) -> Path:
    """A copy of the example's models: servers keep their state in the repository."""
    folder = tmp_path_factory.mktemp("digits") / "models"
    return Path(shutil.copytree(ROOT / "examples" / "digits" / "models", folder))


@pytest.fixture
def run_python():
    """Run code in a fresh interpreter; what it printed."""

    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
        ).stdout

    return run
