"""Optimised graphs kept on disk: a version that loads again skips ONNX Runtime's optimiser.

An entry is found by what it was made from: the digest of the model and its external data, the runtime's
version, the device, the session's options, and the CPU's features, since layouts are chosen for them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gateway.serving.onnxfile import ModelFacts

SMALLEST_CACHED_BYTES = 1 << 20
"""Smaller models are optimised in milliseconds: not worth a file."""

LARGEST_CACHED_BYTES = 1 << 30
"""Larger ones come near protobuf's limit of 2 GiB for one file."""

KEPT_ENTRIES = 4
"""Entries of one version that are kept: one each for a few devices and options."""

_READ_BYTES = 1 << 20


def entry(
    folder: Path, model: Path, facts: ModelFacts, made_with: Mapping[str, object]
) -> Path | None:
    """Where the optimised form of a model is, or goes; None where it is not worth one.

    Args:
        folder: of all entries; made if need be.
        model: the .onnx file, ``…/<model>/<version>/model.onnx``.
        facts: about it.
        made_with: everything else that the optimised graph depends on.
    """
    nbytes = facts.file_bytes + facts.external_bytes
    if not SMALLEST_CACHED_BYTES <= nbytes <= LARGEST_CACHED_BYTES:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a repository that is mounted read-only
    digest = hashlib.sha256(repr(sorted(made_with.items())).encode())
    digest.update(_cpu_features().encode())
    for path in (model, *facts.external_files):
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return folder / f"{_stem(model)}-{digest.hexdigest()[:32]}.onnx"


def keep(made: Path, path: Path) -> None:
    """Put a new entry in its place, and drop the version's oldest ones."""
    with suppress(OSError):
        made.replace(path)
        stem = path.name.rpartition("-")[0]
        entries = sorted(path.parent.glob(f"{stem}-*.onnx"), key=lambda p: p.stat().st_mtime)
        for old in entries[:-KEPT_ENTRIES]:
            old.unlink()


def _stem(model: Path) -> str:
    return f"{model.parent.parent.name}-{model.parent.name}"


def _cpu_features() -> str:
    """The machine's architecture and what its CPU can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return f"{platform.machine()} {found[1] if found else os.uname().version}"
