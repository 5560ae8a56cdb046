"""The zoo: every graph of every family, by name."""

from __future__ import annotations

from pathlib import Path

from tests.zoo import dynamic, files, interfaces, networks, strings, tensors
from tests.zoo.building import Graph

SETTINGS_FILE = "config.yaml"


def all_graphs() -> list[Graph]:
    """Every graph, always in the same order."""
    return [
        *tensors.graphs(),
        *interfaces.graphs(),
        *networks.graphs(),
        *dynamic.graphs(),
        *strings.graphs(),
        *files.graphs(),
    ]


def write_version(graph: Graph, repository: Path) -> Path:
    """Write a graph as version 1 of a model of its name; the version's folder."""
    folder = repository / graph.name / "1"
    folder.mkdir(parents=True)
    graph.write(folder)
    if graph.config:
        (folder.parent / SETTINGS_FILE).write_text(graph.config)
    return folder
