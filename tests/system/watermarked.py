"""Watermarked requests: models, tensors whose every element says whose it is, wire forms, and a tally.

Each row of a request has a 64-bit id that no other has, and all its elements follow from that; so do
those of the answer.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgpack
import numpy as np
import onnx.parser
import orjson

MOST_ROWS = 16
"""Of a request; ids are numbered by it."""

LARGE_REPEATS = 36_000
"""A row of the large output is then 1.1 MiB: more than a slot has for outputs of unknown shape."""

PIECE_BITS = 22
"""What an FP32 element holds of an id; twice that is still exact."""

ENCODINGS = ("binary", "json", "msgpack")
DATATYPES = {"INT64": np.dtype(np.int64), "FP32": np.dtype(np.float32), "BYTES": np.dtype(object)}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}

Arrays = dict[str, np.ndarray]


# Ids, and tensors made of them


def ids_of(number: int, rows: int) -> np.ndarray:
    """The ids of a request's rows. splitmix64 is one-to-one: no two rows have the same."""
    x = np.arange(number * MOST_ROWS, number * MOST_ROWS + rows, dtype=np.uint64)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def words(ids: np.ndarray, width: int) -> np.ndarray:
    """INT64 [rows, width]: the id, and the position mixed in."""
    return (ids[:, None] ^ np.arange(width, dtype=np.uint64)).view(np.int64)


def pieces(ids: np.ndarray, width: int) -> np.ndarray:
    """FP32 [rows, width]: a third of the id each."""
    shifts = PIECE_BITS * (np.arange(width, dtype=np.uint64) % 3)
    return (ids[:, None] >> shifts & (1 << PIECE_BITS) - 1).astype(np.float32)


def strings(ids: np.ndarray, width: int, is_text: bool) -> np.ndarray:
    """BYTES [rows, width]: the id's bytes, which may be any, or its digits; once or a few times."""
    flat = words(ids, width).ravel()
    elements = [
        b"%016x" % (w & 2**64 - 1) if is_text else struct.pack("<q", w) for w in flat.tolist()
    ]
    array = np.empty(flat.size, object)
    array[:] = [element * (1 + element[-1] % 5) for element in elements]
    return array.reshape(len(ids), width)


@dataclass(frozen=True)
class Kind:
    """A model and how to ask it.

    Attributes:
        weight: share of the requests, in percent.
        most_rows: of a request.
        graph: its text, with {version} for the version.
        config: of its config.yaml.
        draw: inputs from ids; the flag says that strings must be text.
        answer: outputs that belong to inputs and a version.
        versions: those that are served; the last is the routed one.
    """

    weight: int
    most_rows: int
    graph: str
    config: str
    draw: Callable[[random.Random, np.ndarray, bool], Arrays]
    answer: Callable[[Arrays, int], Arrays]
    versions: tuple[int, ...] = (1,)


def _draw_padded(chance: random.Random, ids: np.ndarray, _is_text: bool) -> Arrays:
    length = chance.randint(1, 150)  # beyond the last bucket at times
    return {"words": words(ids, length), "pieces": pieces(ids, length)}


def _answer_padded(inputs: Arrays, _version: int) -> Arrays:
    low = inputs["words"] % 2**PIECE_BITS  # padding that is not zero would show in the total
    return {
        "words_out": inputs["words"] ^ 1,
        "pieces_out": inputs["pieces"] * 2,
        "total": low.sum(axis=1) + inputs["pieces"].astype(np.int64).sum(axis=1),
    }


def _draw_whole(chance: random.Random, ids: np.ndarray, _is_text: bool) -> Arrays:
    width = chance.randint(0, 20)
    grid = words(ids, 3 * width).reshape(len(ids), 3, width)
    return {"grid": grid, "scalar": words(ids[:1], 1).reshape(())}


def _draw_dependent(_chance: random.Random, ids: np.ndarray, _is_text: bool) -> Arrays:
    return {"words": words(ids, 2), "repeats": (ids[:, None] % 300).view(np.int64)}


KINDS = {
    "fixed": Kind(
        40, MOST_ROWS,
        """fixed (int64[batch,4] words, float[batch,12] pieces)
            => (int64[batch,4] words_out, float[batch,12] pieces_out) {
            v = Constant <value_int: int = {version}> ()
            words_out = BitwiseXor (words, v)
            f = Cast <to: int = 1> (v)
            pieces_out = Mul (pieces, f)
        }""",
        "max_batch_size: 32\nversion_policy: all\ninstances: [{count: 2, threads: 1}]\n",
        lambda _chance, ids, _is_text: {"words": words(ids, 4), "pieces": pieces(ids, 12)},
        lambda inputs, version: {
            "words_out": inputs["words"] ^ version,
            "pieces_out": inputs["pieces"] * np.float32(version),
        },
        versions=(1, 2),
    ),
    "padded": Kind(
        25, 3,
        """padded (int64[batch,length] words, float[batch,length] pieces)
            => (int64[batch,length] words_out, float[batch,length] pieces_out, int64[batch] total) {
            one = Constant <value_int: int = 1> ()
            words_out = BitwiseXor (words, one)
            pieces_out = Add (pieces, pieces)
            modulus = Constant <value_int: int = 4194304> ()
            low = Mod (words, modulus)
            whole = Cast <to: int = 7> (pieces)
            both = Add (low, whole)
            axes = Constant <value_ints: ints = [1]> ()
            total = ReduceSum <keepdims: int = 0> (both, axes)
        }""",
        "max_batch_size: 16\npadding: {length: {buckets: [8, 32, 128]}}\ninstances: [{threads: 1}]\n",
        _draw_padded,
        _answer_padded,
    ),
    "texts": Kind(
        12, 4,
        """texts (string[batch,3] texts) => (string[batch,3] same, string[batch,3] twice) {
            same = Identity (texts)
            twice = StringConcat (texts, texts)
        }""",
        "max_batch_size: 16\ninstances: [{threads: 1}]\n",
        lambda _chance, ids, is_text: {"texts": strings(ids, 3, is_text)},
        lambda inputs, _version: {"same": inputs["texts"], "twice": inputs["texts"] * 2},
    ),
    "whole": Kind(
        12, 4,
        """whole (int64[h,3,w] grid, int64 scalar) => (int64[h,3,w] grid_out, int64 scalar_out) {
            grid_out = BitwiseXor (grid, scalar)
            one = Constant <value_int: int = 1> ()
            scalar_out = BitwiseXor (scalar, one)
        }""",
        "max_batch_size: 0\ninstances: [{threads: 1}]\n",
        _draw_whole,
        lambda inputs, _version: {
            "grid_out": inputs["grid"] ^ inputs["scalar"],
            "scalar_out": np.asarray(inputs["scalar"] ^ 1),
        },
    ),
    "dependent": Kind(
        9, 1,
        """dependent (int64[batch,2] words, int64[batch,1] repeats) => (int64[batch,m] tiled) {
            largest = ReduceMax <keepdims: int = 0> (repeats)
            shape = Constant <value_ints: ints = [1]> ()
            k = Reshape (largest, shape)
            all = Concat <axis: int = 0> (shape, k)
            tiled = Tile (words, all)
        }""",
        "max_batch_size: 1\ninstances: [{threads: 1}]\n",
        _draw_dependent,
        lambda inputs, _version: {"tiled": np.tile(inputs["words"], inputs["repeats"].max())},
    ),
    "large": Kind(
        2, 2,
        f"""large (int64[batch,4] words) => (int64[batch,m] tiled) {{
            all = Constant <value_ints: ints = [1, {LARGE_REPEATS}]> ()
            tiled = Tile (words, all)
        }}""",
        "max_batch_size: 4\ninstances: [{threads: 1}]\n",
        lambda _chance, ids, _is_text: {"words": words(ids, 4)},
        lambda inputs, _version: {"tiled": np.tile(inputs["words"], LARGE_REPEATS)},
    ),
}  # fmt: skip


def write_repository(folder: Path) -> None:
    """All models, each in its versions."""
    for name, kind in KINDS.items():
        for version in kind.versions:
            graph = kind.graph.replace("{version}", str(version))
            text = '<ir_version: 9, opset_import: ["" : 20]>\n' + graph
            path = folder / name / str(version) / "model.onnx"
            path.parent.mkdir(parents=True)
            path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        (folder / name / "config.yaml").write_text(kind.config)


# The wire


@dataclass(frozen=True)
class Request:
    """One request and what must come back."""

    kind: str
    encoding: str
    version: int
    head: bytes
    body: bytes
    expected: Arrays


def request_of(chance: random.Random, number: int) -> Request:
    """A request that follows from the chance, with the ids of its number."""
    (name,) = chance.choices(list(KINDS), [kind.weight for kind in KINDS.values()])
    kind, encoding = KINDS[name], chance.choice(ENCODINGS)
    rows = 1 if chance.random() < 0.6 else chance.randint(1, kind.most_rows)
    inputs = kind.draw(chance, ids_of(number, rows), encoding == "json")
    asked = chance.choice((None, *kind.versions))
    version = kind.versions[-1] if asked is None else asked
    headers, body = _body(encoding, inputs)
    path = f"/v2/models/{name}" + ("" if asked is None else f"/versions/{asked}")
    head = (
        f"POST {path}/infer HTTP/1.1\r\nHost: test\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    )
    return Request(name, encoding, version, head.encode(), body, kind.answer(inputs, version))


def _body(encoding: str, inputs: Arrays) -> tuple[str, bytes]:
    entries, raw = [], []
    for name, array in inputs.items():
        entry: dict = {"name": name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
        if encoding == "json":
            is_text = array.dtype == object
            entry["data"] = [e.decode() for e in array.flat] if is_text else array.ravel()
        elif encoding == "msgpack":
            entry["data"] = array.ravel().tolist() if array.dtype == object else array.tobytes()
        else:
            raw.append(_raw(array))
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        entries.append(entry)
    if encoding == "msgpack":
        return "Content-Type: application/msgpack\r\n", msgpack.packb({"inputs": entries})
    document = {"inputs": entries, "parameters": {"binary_data_output": encoding == "binary"}}
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = f"Inference-Header-Content-Length: {len(text)}\r\n" if raw else ""
    return headers, text + b"".join(raw)


def _raw(array: np.ndarray) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(element)) + element for element in array.flat)
    return array.tobytes()


def outputs_of(headers: dict[str, str], body: bytes) -> tuple[str, Arrays]:
    """The version that an answer names, and its outputs."""
    if headers["content-type"] == "application/msgpack":
        document, at = msgpack.unpackb(body), len(body)
    else:
        at = int(headers.get("inference-header-content-length", len(body)))
        document = orjson.loads(body[:at])
    outputs = {}
    for entry in document["outputs"]:
        data, dtype = entry.get("data"), DATATYPES[entry["datatype"]]
        if data is None:
            size = entry["parameters"]["binary_data_size"]
            data, at = body[at : at + size], at + size
        outputs[entry["name"]] = _array(data, dtype).reshape(entry["shape"])
    if at != len(body):
        raise ValueError("bytes are left over behind the last output")
    return document["model_version"], outputs


def _array(data: bytes | list, dtype: np.dtype) -> np.ndarray:
    if not dtype.hasobject:
        return np.frombuffer(data, dtype) if isinstance(data, bytes) else np.array(data, dtype)
    if isinstance(data, bytes):
        elements, at = [], 0
        while at < len(data):
            end = at + 4 + struct.unpack_from("<I", data, at)[0]
            elements.append(data[at + 4 : end])
            at = end
    else:
        elements = [e.encode() if isinstance(e, str) else e for e in data]
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


# Counting


@dataclass
class Tally:
    """What came of all requests.

    Attributes:
        right: answers all of whose elements are their asker's, by model and encoding.
        elements, checked_bytes: in the right ones.
        wrong: what was wrong, one line for an answer that is not right.
        foreign_bytes: in elements that are not what they must be.
        left: clients that went away, by when.
        errors: answers other than 200, by status.
        excused: connections broken by the kill of a front end, whose request was sent again.
        broken: other broken connections.
        unanswered: requests whose time was over.
        slow: answers that were read slowly, to the end.
        killed: by what and signal.
    """

    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    elements: int = 0
    checked_bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    foreign_bytes: int = 0
    left: Counter[str] = field(default_factory=Counter)
    errors: Counter[int] = field(default_factory=Counter)
    excused: int = 0
    broken: int = 0
    unanswered: int = 0
    slow: int = 0
    killed: Counter[str] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        """How many have had an end."""
        answers = self.right.total() + len(self.wrong) + self.errors.total()
        return answers + self.left.total() + self.broken + self.unanswered

    def check(self, request: Request, headers: dict[str, str], body: bytes) -> None:
        """Hold a whole answer with status 200 against its request."""
        try:
            version, outputs = outputs_of(headers, body)
        except (ValueError, TypeError, KeyError, struct.error) as error:
            self._blame(request, f"it does not decode: {error}")
            return
        if not version == headers["x-model-version"] == str(request.version):
            self._blame(request, f"it is of version {version}")
        elif {name: (a.dtype, a.shape) for name, a in outputs.items()} != {
            name: (a.dtype, a.shape) for name, a in request.expected.items()
        }:
            self._blame(request, "names, datatypes or shapes differ")
        elif foreign := sum(
            _foreign_bytes(outputs[name], array) for name, array in request.expected.items()
        ):
            self.foreign_bytes += foreign
            self._blame(request, f"{foreign} bytes are not its own")
        else:
            self.right[request.kind, request.encoding] += 1
            self.elements += sum(array.size for array in outputs.values())
            self.checked_bytes += sum(map(_size, outputs.values()))

    def _blame(self, request: Request, what: str) -> None:
        self.wrong.append(f"{request.kind}, {request.encoding}: {what}")


def _foreign_bytes(got: np.ndarray, expected: np.ndarray) -> int:
    """Bytes of the elements that are not what they must be."""
    return _size(got[got != expected])


def _size(array: np.ndarray) -> int:
    """Bytes of the elements."""
    return sum(map(len, array.flat)) if array.dtype.hasobject else array.nbytes
