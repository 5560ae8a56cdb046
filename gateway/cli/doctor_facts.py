"""What ``gateway doctor`` finds out about the installation and the machine. Judges nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway import __version__
from gateway.serving import cpus, memory

RUNTIME_DEADLINE_S = 60
"""For the import of ONNX Runtime in a process of its own; a GPU's libraries are large."""

KERNELS = (
    "ring",
    "pack",
    "decode",
    "slots",
    "heads",
    "ledger",
    "skeleton",
    "burst",
    "templates",
    "fastlane",
)

_SHOWN_FEATURES = re.compile(
    r"avx2|avx512(f|_vnni|_bf16|_fp16)|avx_vnni|amx_(tile|int8|bf16)|asimd|asimddp|sve2?|i8mm|bf16"
)
"""Of a CPU's features, those for which ONNX Runtime has kernels of their own."""

_ASK_RUNTIME = (
    "import json; from gateway.serving import session; print(json.dumps(session.runtime_facts()))"
)


@dataclass(frozen=True, slots=True)
class Runtime:
    """The software. Versions are None where something is not installed."""

    gateway: str
    python: str
    system: str
    onnxruntime: str | None
    onnxruntime_error: str | None  # why it is not usable; None if it is
    onnxruntime_distributions: list[str]  # that bring the module: one, in a sound installation
    execution_providers: list[str]
    execution_devices: list[str]
    aiohttp: str | None
    aiohttp_c_parser: bool
    uvloop: str | None


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled kernels."""

    build: str | None  # release or debug; None where they do not load
    layout: int | None
    folder: str
    error: str | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What this process, and with it a server that is started like it, may use."""

    open_files_soft: int | None  # None: no limit
    open_files_hard: int | None
    cpus_usable: int
    cpus_affinity: int
    cpus_machine: int
    memory_usable_bytes: int
    memory_machine_bytes: int
    memfd_sealing: bool
    pidfd: bool


@dataclass(frozen=True, slots=True)
class Devices:
    """The hardware that models run on."""

    cpu: str
    cpu_features: list[str]
    nvidia: list[str]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything but the models."""

    runtime: Runtime
    kernels: Kernels
    limits: Limits
    devices: Devices


def collect() -> Facts:
    """Look at all of it; takes a second, most of it for the import of ONNX Runtime."""
    return Facts(_runtime(), _kernels(), _limits(), _devices())


def _runtime() -> Runtime:
    answer, error = _ask_runtime()
    http = _version("aiohttp")
    return Runtime(
        gateway=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        onnxruntime=answer.get("version"),
        onnxruntime_error=error,
        onnxruntime_distributions=_distributions("onnxruntime"),
        execution_providers=answer.get("providers", []),
        execution_devices=answer.get("devices", []),
        aiohttp=http,
        aiohttp_c_parser=http is not None and _parses_in_c(),
        uvloop=_version("uvloop"),
    )


def _ask_runtime() -> tuple[dict[str, Any], str | None]:
    """`session.runtime_facts`, and what went wrong. Only workers' processes import ONNX Runtime."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_RUNTIME],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=RUNTIME_DEADLINE_S,
            check=True,
        )
        # The last line: libraries print what they like before it.
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {}, f"its import took longer than {RUNTIME_DEADLINE_S} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().split("\n")
        return {}, lines[-1] or f"its import ended with status {error.returncode}"
    except (OSError, ValueError, IndexError) as error:
        return {}, f"it could not be asked: {error}"
    return facts, None


def _distributions(module: str) -> list[str]:
    """The installed distributions that bring a module, with their versions."""
    names = importlib.metadata.packages_distributions().get(module, [])
    return [f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))]


def _version(module: str) -> str | None:
    """The version of a module that can be imported; None otherwise."""
    try:
        importlib.import_module(module)
        return importlib.metadata.version(module)
    except ImportError:  # PackageNotFoundError is one
        return None


def _parses_in_c() -> bool:
    """Whether aiohttp has its C parser, and was not told to do without."""
    from aiohttp import http_parser

    return http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy


def _kernels() -> Kernels:
    folder = Path(__file__).resolve().parents[1] / "_kernels"
    try:
        ring, *_others = [importlib.import_module(f"gateway._kernels.{name}") for name in KERNELS]
    except ImportError as error:
        return Kernels(None, None, str(folder), str(error))
    folder = Path(ring.__file__ or folder).parent
    is_debug = ring.set_steps(0)  # has steps only there
    return Kernels("debug" if is_debug else "release", ring.LAYOUT["layout"], str(folder), None)


def _limits() -> Limits:
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return Limits(
        open_files_soft=soft,
        open_files_hard=hard,
        cpus_usable=cpus.usable_cpus(),
        cpus_affinity=len(os.sched_getaffinity(0)),
        cpus_machine=os.cpu_count() or 1,
        memory_usable_bytes=cpus.usable_memory_bytes(),
        memory_machine_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memfd_sealing=_seals_memory(),
        pidfd=_opens_pidfd(),
    )


def _seals_memory() -> bool:
    """Whether a memfd can be sealed against new writers, who are then refused."""
    size = resource.getpagesize()
    try:
        fd = memory.create("doctor", size)
    except OSError:
        return False
    try:
        memory.forbid_new_writers(fd)
        with suppress(PermissionError):  # as it should be
            memory.map_writable(fd, size).close()
            return False
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _opens_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _devices() -> Devices:
    text = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    features = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    known = features[1].split() if features else []
    return Devices(
        cpu=model[1] if model else platform.machine(),
        cpu_features=[name for name in known if _SHOWN_FEATURES.fullmatch(name)],
        nvidia=_nvidia(Path("/proc/driver/nvidia/gpus")),
    )


def _nvidia(folder: Path) -> list[str]:
    """The names of the GPUs that NVIDIA's driver lists in a folder of /proc."""
    found = []
    with suppress(OSError):
        for gpu in sorted(folder.iterdir()):
            name = re.search(r"^Model:\s*(.+)$", _read(gpu / "information"), re.MULTILINE)
            found.append(name[1].strip() if name else gpu.name)
    return found


def _read(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
