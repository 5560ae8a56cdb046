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
"""What of the model repository is ours: state, secret, cache, uploads."""


@dataclass(frozen=True, slots=True)
class Place:
    """A database, and the folder of the server's secret."""

    url: str
    folder: Path


def place_at(url: str | None, home: Path) -> Place:
    """Where a setting, or the want of one, puts the state.

    Args:
        url: the setting.
        home: the folder of it that the model repository has, or would have.
    """
    if url is None:
        url = f"{SQLITE}{home / 'state.db'}"
    elif url.startswith(SQLITE):
        home = Path(
            url.removeprefix(SQLITE)
        ).parent  # the secret lies beside a database that is a file
    return Place(url, home)


@contextmanager
def state_of(settings: ServerSettings) -> Iterator[Place]:
    """The place that the settings say.

    A repository that nobody can write to, as a volume mounted read-only, gives a place that does not
    outlive the server: serving needs no state, so that it is not refused for the want of it.
    """
    home = settings.model_repository / STATE_FOLDER
    is_writable = os.access(home if home.exists() else settings.model_repository, os.W_OK)
    if settings.state is not None or is_writable:
        yield place_at(settings.state, home)
    else:
        log.warning(
            "the model repository cannot be written to: routes, rollouts and keys will be lost with "
            "the server; set state to keep them"
        )
        with tempfile.TemporaryDirectory(prefix="gateway-") as made:
            yield place_at(None, Path(made))
