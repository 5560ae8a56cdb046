"""Graphs whose weights lie beside the model file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from tests.zoo.building import MODEL_FILE, Arrays, Graph, Write, normal, parse, weights

PAGE_BYTES = 4096
"""Offsets of tensors in one file are whole pages, as exporters make them."""


def graphs() -> list[Graph]:
    """All of this module."""
    rng = weights("files")
    one = {"w": normal(rng, 4, 3)}
    several = {"w": normal(rng, 4, 3), "b": normal(rng, 3), "s": normal(rng, 1)}
    product = "(float[n, 4] x) => (float[n, 3] y) { y = MatMul (x, w) }"
    scaled = (
        "(float[n, 4] x) => (float[n, 3] y) { a = MatMul (x, w)  b1 = Add (a, b)  y = Mul (b1, s) }"
    )
    return [
        _graph("external_one", _external(product, one, {"w": "weights.bin"})),
        _graph("external_one_file", _external(scaled, several, dict.fromkeys(several, "all.bin"))),
        _graph(
            "external_folders",
            _external(scaled, several, {"w": "parts/w.bin", "b": "parts/more/b.bin", "s": "s"}),
        ),
    ]


def _graph(name: str, write: Write) -> Graph:
    def sample(rng: np.random.Generator, n: int) -> Arrays:
        return {"x": normal(rng, n, 4)}

    return Graph(name, write, sample, batched=True, exact=False)


def _external(text: str, constants: Arrays, places: dict[str, str]) -> Write:
    """Writes each constant to the file that is its place, one behind the other."""

    def write(folder: Path) -> None:
        model = parse(text)
        for name, array in constants.items():
            path = folder / places[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            offset = -(-path.stat().st_size // PAGE_BYTES) * PAGE_BYTES if path.exists() else 0
            with path.open("ab") as file:
                file.truncate(offset)
                file.write(array.tobytes())
            tensor = numpy_helper.from_array(array, name)
            external_data_helper.set_external_data(tensor, places[name], offset, array.nbytes)
            tensor.ClearField("raw_data")
            model.graph.initializer.append(tensor)
        onnx.save(model, folder / MODEL_FILE)

    return write
