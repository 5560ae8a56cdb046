"""Model files on their way into the repository, and out of it. Blocking: to be called beside the loop.

A version appears whole, by one rename, so that neither a crash nor a second registration leaves half of
one. Nothing is read from outside the repository and the model roots, wherever links lead, and nothing but
regular files: a pipe or a device may have no end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gateway.control.repository import MODEL_FILE, SETTINGS_FILE
from gateway.errors import Conflict, Forbidden, InvalidRequest, TooLarge, Unavailable
from gateway.store.place import STATE_FOLDER

CHUNK_BYTES = 1 << 20


class Allowance:
    """The bytes that may still be read of a source, which may grow while it is read.

    Args:
        max_bytes: the setting max_artifact_bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._left = max_bytes

    def take(self, nbytes: int) -> None:
        """So many were read. TooLarge: that is more than there may be."""
        self._left -= nbytes
        if self._left < 0:
            raise TooLarge(f"the source is larger than max_artifact_bytes ({self._max_bytes})")


def digest_of(file: Path, allowance: Allowance | None = None) -> tuple[str, int]:
    """SHA-256 of a file in hex, and its bytes.

    Raises:
        OSError: it cannot be read.
        TooLarge: it has more bytes than it may.
    """
    sha, nbytes = hashlib.sha256(), 0
    with _opened(file) as reader:
        for chunk in _chunks(reader, allowance):
            sha.update(chunk)
            nbytes += len(chunk)
    return sha.hexdigest(), nbytes


def resolve_source(
    path: str, repository: Path, roots: Iterable[Path], may_see: Callable[[str], bool]
) -> Path:
    """What a client's path means: absolute, or relative to the first folder of these that has it.

    Args:
        path: as it was sent.
        repository: the server's. What lies beneath it belongs to the model that its first folder names.
        roots: other folders, of which everything may be read.
        may_see: whether the client may see a model.

    Raises:
        InvalidRequest: there is nothing there.
        Forbidden: it lies, or leads by a link, outside all of them or in a model that may not be seen,
            whether there is anything or not.
    """
    if not path or "\0" in path:
        raise InvalidRequest("expected the path of a model file or of a folder with one")
    home = Path(os.path.realpath(repository))
    is_outside = False
    for root in (repository, *roots):
        base = Path(os.path.realpath(root))
        found = Path(os.path.realpath(base / path))
        if not _is_open(found, base, home, may_see):
            is_outside = True
        elif os.path.exists(found):  # noqa: PTH110 - a name that is too long is an error to `Path`
            return found
    if is_outside:
        raise Forbidden(
            "the path lies outside model_roots and what this key may see of the model repository"
        )
    raise InvalidRequest("there is nothing at this path beneath the repository and model_roots")


def _is_open(found: Path, base: Path, home: Path, may_see: Callable[[str], bool]) -> bool:
    """Whether a client may use what lies there. ``home`` is the repository; a root may be around it."""
    if found == base or not found.is_relative_to(base) or home.is_relative_to(found):
        return False
    if STATE_FOLDER in found.relative_to(base).parts:
        return False  # the server's secret and other people's uploads
    return not found.is_relative_to(home) or may_see(found.relative_to(home).parts[0])


def model_file(source: Path) -> Path:
    """The model file of a source: itself, or ``model.onnx`` in it. InvalidRequest without one."""
    file = source / MODEL_FILE if source.is_dir() else source
    if file.is_symlink() or not file.is_file():
        raise InvalidRequest(f"expected a model file, or a folder with {MODEL_FILE} in it")
    return file


def place(
    repository: Path,
    model: str,
    version: int,
    source: Path,
    allowance: Allowance,
    *,
    is_move: bool,
) -> None:
    """Make ``<repository>/<model>/<version>`` of a file, or of a folder with all its regular files.

    Args:
        repository: the server's.
        model: its name.
        version: a number that it does not have yet.
        source: what to make it of.
        allowance: of bytes that are copied.
        is_move: a file that may be taken away instead of copied.

    Raises:
        TooLarge: there is more to copy.
        Conflict: the version is there already.
        Unavailable: no room, or no right to write.
    """
    target = repository / model / str(version)
    try:
        drafts = drafts_folder(repository)
        draft = Path(tempfile.mkdtemp(dir=drafts))
        try:
            made = draft / str(version)
            made.mkdir()
            if source.is_dir():
                _copy_folder(source, made, allowance)
            elif is_move:
                source.replace(made / MODEL_FILE)
            else:
                _copy_file(source, made / MODEL_FILE, allowance)
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


def place_settings(repository: Path, model: str, source: Path, allowance: Allowance) -> None:
    """Take over the settings of a folder of versions, if it has any and the model has none.

    Raises:
        TooLarge: they are larger than they may be.
        Unavailable: no room, or no right to write.
    """
    file, target = source / SETTINGS_FILE, repository / model / SETTINGS_FILE
    if file.is_symlink() or not file.is_file() or target.exists():
        return
    try:
        draft = Path(tempfile.mkdtemp(dir=drafts_folder(repository)))
        try:
            _copy_file(file, draft / SETTINGS_FILE, allowance)
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


def _copy_folder(source: Path, target: Path, allowance: Allowance) -> None:
    """Copy everything but links, which may lead anywhere, and what is neither file nor folder."""
    with os.scandir(source) as entries:
        for entry in entries:
            made = target / entry.name
            if entry.is_dir(follow_symlinks=False):
                made.mkdir()
                _copy_folder(Path(entry.path), made, allowance)
            elif entry.is_file(follow_symlinks=False):
                _copy_file(Path(entry.path), made, allowance)


def _copy_file(source: Path, target: Path, allowance: Allowance) -> None:
    with _opened(source, os.O_NOFOLLOW) as reader, target.open("wb") as writer:
        for chunk in _chunks(reader, allowance):
            writer.write(chunk)


@contextmanager
def _opened(file: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """A regular file. OSError for anything else, which may have come there since it was looked at."""
    flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(file, flags), "rb") as reader:
        if not stat.S_ISREG(os.fstat(reader.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield reader


def _chunks(reader: BinaryIO, allowance: Allowance | None) -> Iterator[bytes]:
    while chunk := reader.read(CHUNK_BYTES):
        if allowance is not None:
            allowance.take(len(chunk))
        yield chunk


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
