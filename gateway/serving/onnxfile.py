"""What a model file says of itself, read before ONNX Runtime opens it.

The reader skips over tensors' data without touching it and keeps nothing that grows with the file. What
it finds holds for as long as nobody changes the files.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import LoadError
from gateway.serving.onnxtensors import MAX_NAME_BYTES, TensorChecks
from gateway.serving.protobuf import fields, signed, text_of

MAX_FILE_BYTES = (1 << 31) - 1
"""Of a model file: the most that protobuf parses; larger models keep their weights in external data."""

MAX_GRAPH_DEPTH = 64
"""Graphs inside each other; bounds the recursion here. Protobuf's own limit is about 33."""

MAX_NAMES = 65_536
"""Distinct operator types, opset domains, graph inputs and graph outputs, each; bounds their memory."""

# Keys of the fields that are read: 8 * number + wire type (0: varint, 2: length and bytes).
_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION = 8, 58, 66, 162, 202
_OPSET_DOMAIN, _OPSET_VERSION = 10, 16
_TRAINING_GRAPHS = frozenset((10, 18))
_FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 58, 90
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE, _GRAPH_INPUT, _GRAPH_OUTPUT = 10, 42, 122, 90, 98
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 34, 42, 58
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_SPARSE = 42, 50, 178
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSES = 82, 90, 186
_VALUE_NAME, _VALUE_TYPE = 10, 18
_TYPE_TENSOR = 10
_TYPE_KINDS = frozenset((10, 34, 42, 58, 66, 74))  # a oneof: the last that is given counts
_TENSOR_TYPE_SHAPE = 18

# Keys that may come once.
_MODEL_ONCE = frozenset((_MODEL_IR, _MODEL_GRAPH))
_OPSET_ONCE = frozenset((_OPSET_DOMAIN, _OPSET_VERSION))
_NODE_ONCE = frozenset((_NODE_OP, _NODE_DOMAIN))
_ATTRIBUTE_ONCE = frozenset((_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_SPARSE))
_VALUE_ONCE = frozenset((_VALUE_NAME, _VALUE_TYPE))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model file says of itself.

    Attributes:
        file_bytes: of the .onnx file.
        external_bytes: of the external files together, each counted once.
        external_files: where external data lies, links resolved, in the order first named.
        ops: operator types used in the graph, its subgraphs and the local functions, ``domain::Op``
            for domains other than ONNX's own.
        opsets: versions by domain; ONNX's own domain is "".
        ir_version: 0 where the file names none.
        unranked: graph inputs and outputs that are tensors without any shape.
        initializers_as_inputs: graph inputs that have a default.
    """

    file_bytes: int
    external_bytes: int
    external_files: tuple[Path, ...]
    ops: frozenset[str]
    opsets: dict[str, int]
    ir_version: int
    unranked: frozenset[str]
    initializers_as_inputs: frozenset[str]


def examine(path: Path) -> ModelFacts:
    """Read a model file's facts and check every tensor in it, without reading tensors' data.

    Time is linear in the file's number of fields, about 0.3 µs each.

    Raises:
        LoadError: the file cannot be read, is no ONNX model or is damaged; or a tensor's dims do not fit
            its data, or its external data is not wholly inside a file of the model's own folder.
    """
    try:
        folder = path.parent.resolve(strict=True)
        # A named pipe must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise LoadError("the model file cannot be opened", str(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LoadError("the model file is not a regular file")
        if status.st_size == 0:
            raise LoadError("the model file is empty")
        if status.st_size > MAX_FILE_BYTES:
            raise LoadError(
                f"the model file has {status.st_size} bytes, of {MAX_FILE_BYTES} at most: store its "
                f"weights as external data"
            )
        data = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: it was cut meanwhile
        raise LoadError("the model file cannot be read", str(error)) from None
    finally:
        os.close(descriptor)
    with data:
        return _Scan(data, folder).model()


class _Scan:
    """Walks through one mapped model file and collects its facts; LoadError at the first bad thing.

    Methods take a message's first and one-past-last byte.
    """

    def __init__(self, data: mmap.mmap, folder: Path) -> None:
        self._data = data
        self._ops: set[tuple[bytes, bytes]] = set()  # domain and type
        self._inputs: set[bytes] = set()
        self._unranked: set[bytes] = set()
        self._defaults: set[bytes] = set()
        self._tensors = TensorChecks(data, folder)

    def model(self) -> ModelFacts:
        """The facts of the whole file."""
        ir_version, has_graph = 0, False
        opsets: dict[str, int] = {}
        for key, at, end in fields(self._data, 0, len(self._data), _MODEL_ONCE):
            if key == _MODEL_GRAPH:
                has_graph = True
                self._interface(at, end)
                self._graph(at, end, 1, self._inputs)
            elif key == _MODEL_FUNCTION:
                self._function(at, end)
            elif key == _MODEL_TRAINING:
                self._training(at, end)
            elif key == _MODEL_OPSET:
                domain, version = self._opset(at, end)
                opsets[domain] = version
                _bound(len(opsets), "opset domains")
            elif key == _MODEL_IR:
                ir_version = signed(at)
        if not has_graph:
            raise LoadError("the model file holds no graph: it is not an ONNX model")
        return ModelFacts(
            file_bytes=len(self._data),
            external_bytes=sum(self._tensors.files.values()),
            external_files=tuple(self._tensors.files),
            ops=frozenset(
                f"{text_of(domain)}::{text_of(op)}" if domain else text_of(op)
                for domain, op in self._ops
            ),
            opsets=opsets,
            ir_version=ir_version,
            unranked=frozenset(map(text_of, self._unranked)),
            initializers_as_inputs=frozenset(map(text_of, self._defaults)),
        )

    def _opset(self, at: int, end: int) -> tuple[str, int]:
        domain, version = b"", 0
        for key, a, b in fields(self._data, at, end, _OPSET_ONCE):
            if key == _OPSET_DOMAIN:
                domain = self._domain(a, b)
            elif key == _OPSET_VERSION:
                version = signed(a)
        return text_of(domain), version

    def _training(self, at: int, end: int) -> None:
        ops = self._ops
        self._ops = set()  # ONNX Runtime runs none of these
        for key, a, b in fields(self._data, at, end, _TRAINING_GRAPHS):
            if key in _TRAINING_GRAPHS:
                self._graph(a, b, 1, set())
        self._ops = ops

    def _function(self, at: int, end: int) -> None:
        for key, a, b in fields(self._data, at, end):
            if key == _FUNCTION_NODE:
                self._node(a, b, 1)
            elif key == _FUNCTION_ATTRIBUTE:
                self._attribute(a, b, 1)

    def _interface(self, at: int, end: int) -> None:
        """Note the main graph's inputs; first, since initializers come before them in most files."""
        for key, a, b in fields(self._data, at, end):
            if key not in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                continue
            name, unranked = b"", False
            for field, c, d in fields(self._data, a, b, _VALUE_ONCE):
                if field == _VALUE_NAME:
                    name = self._name(c, d, "a graph input or output")
                elif field == _VALUE_TYPE:
                    unranked = self._is_unranked(c, d)
            if key == _GRAPH_INPUT:
                self._inputs.add(name)
            if unranked:
                self._unranked.add(name)
            _bound(max(len(self._inputs), len(self._unranked)), "graph inputs and outputs")

    def _is_unranked(self, at: int, end: int) -> bool:
        """Whether a type is a tensor's and has no shape."""
        unranked = False
        for key, a, b in fields(self._data, at, end, _TYPE_KINDS):
            if key in _TYPE_KINDS:
                unranked = key == _TYPE_TENSOR and not any(
                    field == _TENSOR_TYPE_SHAPE for field, _, _ in fields(self._data, a, b)
                )
        return unranked

    def _graph(self, at: int, end: int, depth: int, inputs: set[bytes]) -> None:
        """Check a graph; note which of `inputs` have an initializer."""
        if depth > MAX_GRAPH_DEPTH:
            raise LoadError(f"the model has graphs nested more than {MAX_GRAPH_DEPTH} deep")
        for key, a, b in fields(self._data, at, end):
            if key == _GRAPH_NODE:
                self._node(a, b, depth)
            elif key in (_GRAPH_INITIALIZER, _GRAPH_SPARSE):
                name = (
                    self._tensors.tensor(a, b)
                    if key == _GRAPH_INITIALIZER
                    else self._tensors.sparse(a, b)
                )
                if name in inputs:
                    self._defaults.add(name)

    def _node(self, at: int, end: int, depth: int) -> None:
        op = domain = b""
        for key, a, b in fields(self._data, at, end, _NODE_ONCE):
            if key == _NODE_ATTRIBUTE:
                self._attribute(a, b, depth)
            elif key == _NODE_OP:
                op = self._name(a, b, "an operator type")
            elif key == _NODE_DOMAIN:
                domain = self._domain(a, b)
        self._ops.add((domain, op))
        _bound(len(self._ops), "operator types")

    def _attribute(self, at: int, end: int, depth: int) -> None:
        for key, a, b in fields(self._data, at, end, _ATTRIBUTE_ONCE):
            if key in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                self._tensors.tensor(a, b)
            elif key in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                self._graph(a, b, depth + 1, set())
            elif key in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                self._tensors.sparse(a, b)

    def _name(self, at: int, end: int, of: str) -> bytes:
        if end - at > MAX_NAME_BYTES:
            raise LoadError(f"{of} has a name of {end - at} bytes, of {MAX_NAME_BYTES} at most")
        return self._data[at:end]

    def _domain(self, at: int, end: int) -> bytes:
        """A domain; "" for ONNX's own by either of its names."""
        domain = self._name(at, end, "a domain")
        return b"" if domain == b"ai.onnx" else domain


def _bound(count: int, of: str) -> None:
    if count > MAX_NAMES:
        raise LoadError(f"the model file has more than {MAX_NAMES} {of}")
