"""Finds the builds of a kernel, so that one suite runs over all of them and over its plain twin."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ("release", "debug")
IMPLEMENTATIONS = (*BUILDS, "twin")
COMMANDS = {
    "release": "python setup.py build_ext --inplace",
    "debug": "GATEWAY_CYTHON_DEBUG=1 python setup.py build_ext"
    " --build-lib build/debug --build-temp build/debug-temp",
}


def load(build: str, name: str) -> ModuleType:
    """The kernel `name` ("pack") as the build "release" or "debug", or its plain "twin".

    A build that is missing fails the test and names the command that makes it.
    """
    if build == "twin":
        return importlib.import_module(f"tests.twins.{name}")
    try:
        if build == "release":
            return importlib.import_module(f"gateway._kernels.{name}")
        return _load_debug(name)
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}; build it: {COMMANDS[build]}", pytrace=False)


def _load_debug(name: str) -> ModuleType:
    alias, release = f"gateway._kernels_debug.{name}", f"gateway._kernels.{name}"
    if alias in sys.modules:  # an extension can be initialised only once
        return sys.modules[alias]
    stem = ROOT / "build" / "debug" / "gateway" / "_kernels" / name
    paths = [p for p in (stem.with_name(name + s) for s in EXTENSION_SUFFIXES) if p.exists()]
    if not paths:
        raise ModuleNotFoundError(f"no debug build of the kernel {name!r}")
    spec = spec_from_file_location(
        alias, paths[0], loader=ExtensionFileLoader(alias, str(paths[0]))
    )
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # Cython enters a module under the name it was compiled with too, where the release build belongs.
    if sys.modules.get(release) is module:
        del sys.modules[release]
    sys.modules[alias] = module
    return module
