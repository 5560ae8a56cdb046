"""Files that are no models, broken models, and models made to do harm: each fails to load, and says why."""

from __future__ import annotations

from pathlib import Path

from tests.zoo import hostile_data, hostile_files, hostile_graphs
from tests.zoo.graphs import SETTINGS_FILE
from tests.zoo.hostile_files import Hostile


def all_hostile() -> list[Hostile]:
    """Every hostile model, always in the same order."""
    return [*hostile_files.hostile(), *hostile_data.hostile(), *hostile_graphs.hostile()]


def write_hostile(model: Hostile, repository: Path) -> Path:
    """Write it as version 1 of a model of its name; the version's folder."""
    folder = repository / model.name / "1"
    folder.mkdir(parents=True)
    model.write(folder)
    if model.config:
        (folder.parent / SETTINGS_FILE).write_text(model.config)
    return folder
