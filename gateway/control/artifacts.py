"""Model files on their way into the repository, and out of it. Blocking: to be called beside the loop.

A version appears whole, by one rename, so that neither a crash nor a second registration leaves half of
one. Nothing is read from outside the repository and the model roots, wherever links lead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gateway.control.repository import MODEL_FILE, SETTINGS_FILE
from gateway.errors import Conflict, Forbidden, InvalidRequest, Unavailable
from gateway.store.place import STATE_FOLDER

CHUNK_BYTES = 1 << 20


def digest_of(file: Path) -> tuple[str, int]:
    """SHA-256 of a file in hex, and its bytes. OSError."""
    sha, nbytes = hashlib.sha256(), 0
    with file.open("rb") as reader:
        while chunk := reader.read(CHUNK_BYTES):
            sha.update(chunk)
            nbytes += len(chunk)
    return sha.hexdigest(), nbytes


def resolve_source(path: str, roots: Iterable[Path]) -> Path:
    """What a client's path means: absolute, or relative to the first root that has it.

    Raises:
        InvalidRequest: there is nothing there.
        Forbidden: it lies, or leads by a link, outside all roots.
    """
    if not path or "\0" in path:
        raise InvalidRequest("expected the path of a model file or of a folder with one")
    is_outside = False
    for root in roots:
        try:
            base = root.resolve(strict=True)
            found = (base / path).resolve(strict=True)
        except (OSError, RuntimeError):
            continue
        if found.is_relative_to(base / STATE_FOLDER):
            is_outside = True
            break  # the server's secret and other people's uploads
        if found.is_relative_to(base) and found != base:
            return found
        is_outside = True
    if is_outside or Path(path).is_absolute():
        raise Forbidden("the path lies outside the model repository and model_roots")
    raise InvalidRequest("there is nothing at this path beneath the repository and model_roots")


def model_file(source: Path) -> Path:
    """The model file of a source: itself, or ``model.onnx`` in it. InvalidRequest without one."""
    file = source / MODEL_FILE if source.is_dir() else source
    if file.is_symlink() or not file.is_file():
        raise InvalidRequest(f"expected a model file, or a folder with {MODEL_FILE} in it")
    return file


def place(repository: Path, model: str, version: int, source: Path, *, is_move: bool) -> None:
    """Make ``<repository>/<model>/<version>`` of a file, or of a folder with all its files.

    Args:
        repository: the server's.
        model: its name.
        version: a number that it does not have yet.
        source: what to make it of.
        is_move: a file that may be taken away instead of copied.

    Raises:
        Conflict: the version is there already.
        Unavailable: no room, or no right to write.
    """
    target = repository / model / str(version)
    try:
        drafts = drafts_folder(repository)
        draft = Path(tempfile.mkdtemp(dir=drafts))
        try:
            made = draft / str(version)
            if source.is_dir():
                shutil.copytree(source, made, symlinks=False, ignore=_links)
            else:
                made.mkdir()
                (os.replace if is_move else shutil.copyfile)(source, made / MODEL_FILE)
            _sync(made)
            target.parent.mkdir(exist_ok=True)
            made.rename(target)  # refuses a folder that has something in it
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if target.exists():
            raise Conflict(f"model '{model}' has a version {version} already") from None
        raise Unavailable(f"the version cannot be stored: {error.strerror}") from None


def place_settings(repository: Path, model: str, source: Path) -> None:
    """Take over the settings of a folder of versions, if it has any and the model has none. Unavailable."""
    file, target = source / SETTINGS_FILE, repository / model / SETTINGS_FILE
    if file.is_symlink() or not file.is_file() or target.exists():
        return
    try:
        draft = Path(tempfile.mkdtemp(dir=drafts_folder(repository)))
        try:
            shutil.copyfile(file, draft / SETTINGS_FILE)
            _sync(draft)
            target.parent.mkdir(exist_ok=True)
            (draft / SETTINGS_FILE).replace(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise Unavailable(f"the settings cannot be stored: {error.strerror}") from None


def drafts_folder(repository: Path) -> Path:
    """Where files wait on the repository's own disk. OSError."""
    folder = repository / STATE_FOLDER / "uploads"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def remove_version(repository: Path, model: str, version: int) -> None:
    """Delete a version's files. Unavailable when that is not possible; fine when there are none."""
    _remove(repository, repository / model / str(version))


def remove_model(repository: Path, model: str) -> None:
    """Delete a model with all its files, its settings as well."""
    _remove(repository, repository / model)


def _remove(repository: Path, folder: Path) -> None:
    """Out of sight first, so that no half of it is ever seen."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            grave = Path(tempfile.mkdtemp(dir=drafts_folder(repository)))
            folder.rename(grave / "removed")
            shutil.rmtree(grave, ignore_errors=True)
    except OSError as error:
        raise Unavailable(f"the files cannot be removed: {error.strerror}") from None


def _links(folder: str, names: list[str]) -> set[str]:
    """What `copytree` leaves out: links, which may lead anywhere."""
    return {name for name in names if Path(folder, name).is_symlink()}


def _sync(folder: Path) -> None:
    """Everything in it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
