"""Reads a model repository: ``<repository>/<model>/<version>/model.onnx``, ``<model>/config.yaml``.

Only names are looked at here. A model file is opened by a worker alone, so a broken one can hurt
nothing else. Whatever is passed over is logged with the reason, because "my model does not show up"
is the first question anyone asks; names in the log are escaped, since whoever can make a folder here
chooses them.

Nothing outside the repository is read: a link that leads out of it is refused. Paths are handed on as
they are laid out, not as links resolve, because a model's external data lies beside its name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import ConfigurationError, NotFound, Unavailable
from gateway.names import MAX_VERSION, NAME
from gateway.settings import (
    Latest,
    ModelSettings,
    Promote,
    Specific,
    load_model_settings,
)

MODEL_FILE = "model.onnx"
SETTINGS_FILE = "config.yaml"

_VERSION = re.compile(r"[1-9][0-9]{0,18}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VersionEntry:
    """A version that may be served. ``path`` is its model file, absolute."""

    version: int
    path: Path


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model of the repository: its usable versions, ascending, and why others were ignored."""

    name: str
    settings: ModelSettings
    versions: tuple[VersionEntry, ...]
    ignored: list[str]


class _UnusableError(Exception):
    """Why a file or folder of the repository is passed over, in words."""


def is_model_name(name: str) -> bool:
    """Whether ``name`` may name a model (or a label): ``[A-Za-z0-9][A-Za-z0-9_.-]{0,63}``."""
    return NAME.fullmatch(name) is not None


def parse_version(name: str) -> int | None:
    """The version that a folder's name stands for: canonical, positive, int64; None otherwise."""
    if not _VERSION.fullmatch(name) or int(name) > MAX_VERSION:
        return None
    return int(name)


def scan(repository: Path) -> list[ModelEntry]:
    """The models of a repository by name, those without a usable version among them.

    Raises:
        ConfigurationError: one line; the repository cannot be read, or a model's settings are wrong.
    """
    try:
        root = repository.resolve(strict=True)
        paths = _visible(root)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"model_repository: {str(repository)!r} cannot be read: {_reason(error)}"
        ) from None
    models = []
    for path in paths:
        try:
            if _target(path, root).is_file():
                continue  # a README beside the models
            models.append(_read_model(path, root))
        except _UnusableError as error:
            _log.warning("model repository: ignored %s: %s", ascii(path.name), error)
    return models


def scan_model(repository: Path, name: str) -> ModelEntry:
    """One model of a repository, as it is now.

    Raises:
        NotFound: there is nothing of this name, or it is no model's name.
        Unavailable: the repository cannot be read.
        ConfigurationError: one line; what is there is not a model, or its settings are wrong.
    """
    try:
        root = repository.resolve(strict=True)
        is_there = is_model_name(name) and os.path.lexists(root / name)
    except (OSError, RuntimeError) as error:
        _log.error("model repository: cannot be read: %s", _reason(error))
        raise Unavailable("the model repository cannot be read") from None
    if not is_there:
        raise NotFound(f"unknown model '{name}'" if is_model_name(name) else "unknown model")
    try:
        return _read_model(root / name, root)
    except _UnusableError as error:
        raise ConfigurationError(f"model {name!r}: {error}") from None


def choose(entry: ModelEntry) -> tuple[VersionEntry, ...]:
    """The versions that ``version_policy`` serves, ascending.

    Raises:
        ConfigurationError: the policy names a version that the repository does not have.
    """
    policy = entry.settings.version_policy
    if isinstance(policy, Latest):
        return entry.versions[-policy.latest :]
    if isinstance(policy, Specific):
        absent = set(policy.specific) - {usable.version for usable in entry.versions}
        if absent:
            raise ConfigurationError(
                f"config.yaml of model {entry.name!r}: version_policy.specific: "
                f"the repository has no usable version {min(absent)}"
            )
        return tuple(usable for usable in entry.versions if usable.version in policy.specific)
    return entry.versions


def routed_version(versions: Collection[int], promote: Promote) -> int:
    """The version that answers requests which name none.

    With ``promote: latest`` that is the highest one. With ``promote: manual`` it is the first, so the
    lowest, and stays it until somebody moves the route by hand: a new one gets no traffic by being there.

    Args:
        versions: The versions that can answer, at least one.
        promote: The model's setting.

    Raises:
        ValueError: there is no version.
    """
    return max(versions) if promote == "latest" else min(versions)


def _read_model(folder: Path, root: Path) -> ModelEntry:
    """One folder of the repository. _UnusableError if it is no model's."""
    if not is_model_name(folder.name):
        raise _UnusableError("not a model name")
    if not _target(folder, root).is_dir():
        raise _UnusableError("not a folder")
    settings = _read_settings(folder, root)
    versions, ignored = _read_versions(folder, root)
    for reason in ignored:
        _log.warning("model %r: ignored %s", folder.name, reason)
    if not versions:
        _log.warning("model %r: has no usable version", folder.name)
    return ModelEntry(folder.name, settings, versions, ignored)


def _read_settings(folder: Path, root: Path) -> ModelSettings:
    """The model's settings; the defaults only where there is no file at all."""
    path = folder / SETTINGS_FILE
    if not os.path.lexists(path):
        return ModelSettings()
    try:
        _refuse_special(path, root)
    except _UnusableError as error:
        raise ConfigurationError(f"{SETTINGS_FILE} of model {folder.name!r}: {error}") from None
    return load_model_settings(path)


def _read_versions(folder: Path, root: Path) -> tuple[tuple[VersionEntry, ...], list[str]]:
    """The usable versions of a model, ascending, and the reasons of those that are not."""
    versions: list[VersionEntry] = []
    ignored: list[str] = []
    try:
        paths = _visible(folder)
    except OSError as error:
        return (), [f"all versions: cannot be read: {_reason(error)}"]
    for path in paths:
        version = parse_version(path.name)
        try:
            if version is not None:
                _refuse_special(path / MODEL_FILE, root)
                versions.append(VersionEntry(version, path / MODEL_FILE))
            elif _target(path, root).is_dir():
                raise _UnusableError(f"not a version: 1 to {MAX_VERSION}, without leading zeros")
        except _UnusableError as error:
            ignored.append(f"version folder {path.name!a}: {error}")
    return tuple(sorted(versions, key=lambda usable: usable.version)), ignored


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, by name, without the hidden: ``.gateway`` and ``.git`` are no models."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _target(path: Path, root: Path) -> Path:
    """Where ``path`` leads. _UnusableError if that is nowhere or outside the repository."""
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise _UnusableError(f"{path.name!a} does not exist") from None
    except (OSError, RuntimeError) as error:
        raise _UnusableError(f"{path.name!a} cannot be read: {_reason(error)}") from None
    if not target.is_relative_to(root):
        raise _UnusableError(f"{path.name!a} leads out of the model repository")
    return target


def _refuse_special(path: Path, root: Path) -> None:
    """Refuses what is not a file beneath the repository; reading a pipe would never end."""
    if not _target(path, root).is_file():
        raise _UnusableError(f"{path.name!a} is not a file")


def _reason(error: Exception) -> str:
    """What the system said, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # pathlib says RuntimeError of a circle of links before Python 3.13, and ValueError of a NUL.
    return "symbolic links in a circle" if isinstance(error, RuntimeError) else "not a valid path"
