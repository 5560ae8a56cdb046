"""Where the state of a server is."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.settings import ServerSettings

log = logging.getLogger("gateway.store")

SQLITE = "sqlite:///"

STATE_FOLDER = ".gateway"
"""In the model repository, unless a setting says otherwise."""


@dataclass(frozen=True, slots=True)
class Place:
    """A database, and the folder of the server's secret."""

    url: str
    folder: Path


@contextmanager
def state_of(settings: ServerSettings) -> Iterator[Place]:
    """The place that the settings say.

    A repository that nobody can write to, as a volume mounted read-only, gives a place that does not
    outlive the server: serving needs no state, so that it is not refused for the want of it.
    """
    home = settings.model_repository / STATE_FOLDER
    if settings.state is not None:
        is_file = settings.state.startswith(SQLITE)
        folder = Path(settings.state.removeprefix(SQLITE)).parent if is_file else home
        yield Place(settings.state, folder)
    elif os.access(home if home.exists() else settings.model_repository, os.W_OK):
        yield Place(f"{SQLITE}{home / 'state.db'}", home)
    else:
        log.warning(
            "the model repository cannot be written to: routes, rollouts and keys will be lost with "
            "the server; set state to keep them"
        )
        with tempfile.TemporaryDirectory(prefix="gateway-") as made:
            yield Place(f"{SQLITE}{made}/state.db", Path(made))
