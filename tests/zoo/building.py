"""What the families of the zoo share: the form of a graph, models from text, and values to feed them.

Graphs are written in ONNX's textual syntax (`onnx.parser`), which says names, types and dims as they stand
in the file. Weights are drawn from a seed that is the model's own, so a model is the same each time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

Arrays = dict[str, np.ndarray]
Write = Callable[[Path], None]
Sample = Callable[[np.random.Generator, int], Arrays]

MODEL_FILE = "model.onnx"

OPSET = 21
IR_VERSION = 10  # the one that came with opset 21

NEWEST_OPSET = 28
"""The last opset that both onnx 1.23 and ONNX Runtime 1.32 have."""

NUMPY = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float": np.float32,
    "double": np.float64,
    "string": np.object_,
}
"""The NumPy type of each datatype of the textual syntax that is served."""


@dataclass(frozen=True)
class Graph:
    """One model of the zoo.

    Attributes:
        name: may name a model of a repository.
        write: writes model.onnx and what belongs to it into a version's folder, which exists.
        sample: valid inputs; with that many rows where the graph is batched, else of a size that varies
            with the number where it can. BYTES are object arrays of bytes (UTF-8, NUL among them), BF16
            is ml_dtypes.bfloat16. Optional inputs are there for even numbers of rows.
        batched: whether the gateway should batch its requests, deciding by itself.
        exact: whether an answer has the same bits whichever rows run beside it. ONNX Runtime's matrix
            products and vectorised functions do not promise that; their graphs are compared by `rtol`.
        rtol: relative tolerance of outputs, also absolute, where not exact.
        config: text of its config.yaml; none if empty.
    """

    name: str
    write: Write
    sample: Sample
    batched: bool
    exact: bool = True
    rtol: float = 1e-5
    config: str = ""

    def __str__(self) -> str:
        return self.name


def parse(
    text: str, *, opset: int = OPSET, ir_version: int = IR_VERSION, **constants: np.ndarray
) -> onnx.ModelProto:
    """A model from the text of its graph, ``(inputs) => (outputs) {nodes}``; constants by name."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
    model = onnx.parser.parse_model(f"{header} graph {text}")
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def writer(text: str, **options: int | np.ndarray) -> Write:
    """A `Graph.write` of `parse`'s model."""
    return lambda folder: onnx.save(parse(text, **options), folder / MODEL_FILE)


def weights(name: str) -> np.random.Generator:
    """Draws a model's weights; the same for each name every time."""
    return np.random.default_rng(zlib.crc32(name.encode()))


# Values for samples


def normal(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """Normally distributed."""
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def integers(
    rng: np.random.Generator, low: int, high: int, *shape: int, dtype: type = np.int64
) -> np.ndarray:
    """From ``low`` to ``high - 1``."""
    return np.asarray(rng.integers(low, high, shape)).astype(dtype)


def anything(rng: np.random.Generator, text_type: str, *shape: int) -> np.ndarray:
    """Any value of the datatype: extremes, NaN, infinities, subnormal numbers."""
    if text_type == "string":
        return words(rng, *shape)
    dtype = np.dtype(NUMPY[text_type])
    if dtype == np.bool_:
        return integers(rng, 0, 2, *shape, dtype=np.bool_)
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape).copy()


WORDS = ("", "a", "a,b", "zürich", "日本語", "nul\0inside", "\0", "😀", '"quoted"\\', "x" * 300)


def words(rng: np.random.Generator, *shape: int, of: tuple[str, ...] = WORDS) -> np.ndarray:
    """Strings as bytes; any of those given."""
    array = np.empty(shape, np.object_)
    flat = array.reshape(-1)
    flat[:] = [of[i].encode() for i in rng.integers(0, len(of), flat.size)]
    return array
