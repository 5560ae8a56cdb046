"""Optimised graphs kept on disk: a version that loads again skips ONNX Runtime's optimiser.

An entry is found by what it was made from: the digest of the model, the runtime's version, the device, the
session's options, and the CPU's features, since layouts are chosen for them. Beside it lies the SHA-256
of its content, without which it is not used: a graph with a flipped bit loads and answers wrongly. Models
with external data have none: ONNX Runtime would look for the data beside the entry.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import re
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from gateway.serving.onnxfile import ModelFacts

log = logging.getLogger("gateway.worker")

SMALLEST_CACHED_BYTES = 1 << 20
"""Smaller models are optimised in milliseconds: not worth a file."""

LARGEST_CACHED_BYTES = 1 << 30
"""Larger ones come near protobuf's limit of 2 GiB for one file."""

KEPT_ENTRIES = 4
"""Entries of one version that are kept: one each for a few devices and options."""

ABANDONED_S = 3600.0
"""Age of a file that is being written after which its worker must have been killed over it."""

_READ_BYTES = 1 << 20

_NOTE = ".sha256"
"""What the name of an entry's digest ends in."""

_NOTE_BYTES = 65
"""What is read of a digest: one character more than it has."""

_DIGITS = 32
"""Of a digest: what entries of one stem have in their names, and those of a longer stem do not."""


def entry(
    folder: Path, model: Path, facts: ModelFacts, made_with: Mapping[str, object]
) -> Path | None:
    """Where the optimised form of a model is, or goes; None where it has none.

    Args:
        folder: of all entries; made if need be.
        model: the .onnx file, ``…/<model>/<version>/model.onnx``.
        facts: about it.
        made_with: everything else that the optimised graph depends on.
    """
    is_worth_it = SMALLEST_CACHED_BYTES <= facts.file_bytes <= LARGEST_CACHED_BYTES
    if facts.external_files or not is_worth_it:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a repository that is mounted read-only
    digest = hashlib.sha256(repr(sorted(made_with.items())).encode())
    digest.update(_cpu_features().encode())
    with model.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return folder / f"{_stem(model)}-{digest.hexdigest()[:_DIGITS]}.onnx"


def is_usable(path: Path) -> bool:
    """Whether there is an entry that holds what was put there; one that does not is warned of."""
    if not os.path.lexists(path):
        return False
    try:
        with _open_regular(path) as file, _open_regular(_note_of(path)) as note:
            is_whole = _sha256(file) == note.read(_NOTE_BYTES).decode(errors="replace")
    except OSError:
        is_whole = False
    if not is_whole:
        log.warning("the optimised graph %s is not what was kept there: made again", path.name)
    return is_whole


def keep(made: Path, path: Path) -> None:
    """Put a new entry in its place, its digest first, and drop the version's oldest ones."""
    with suppress(OSError):
        with made.open("rb") as file:
            digest = _sha256(file)
        note = made.with_name(f"{made.name}{_NOTE}")
        try:
            note.write_text(digest)
            note.replace(_note_of(path))
        finally:
            note.unlink(missing_ok=True)
        made.replace(path)
        stem = path.name.rpartition("-")[0]
        every = path.parent.glob(f"{stem}-{'?' * _DIGITS}.onnx")
        entries = sorted(every, key=lambda p: p.stat().st_mtime)
        for old in entries[:-KEPT_ENTRIES]:
            old.unlink()
            _note_of(old).unlink(missing_ok=True)
        for left in path.parent.glob(f"{stem}-{'?' * _DIGITS}.[0-9]*"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                left.unlink()


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _note_of(path: Path) -> Path:
    """Where an entry's digest is."""
    return path.with_name(f"{path.name}{_NOTE}")


def _open_regular(path: Path) -> BufferedReader:
    """OSError where it is no file, or a link: nobody here makes one."""
    # A named pipe must not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


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
