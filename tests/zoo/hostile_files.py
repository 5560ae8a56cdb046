"""The form of a hostile model, and files that are something else than models."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tests.zoo.building import MODEL_FILE, Write, normal, parse, weights

RUNTIME = r"ONNX Runtime refused the model \([A-Z_]+\)"
"""The reason for what only ONNX Runtime sees."""


@dataclass(frozen=True)
class Hostile:
    """One model that must not be served.

    Attributes:
        name: may name a model of a repository.
        write: writes model.onnx and what belongs to it into a version's folder, which exists.
        reason: a regular expression that is found in the reason shown to clients.
        config: text of its config.yaml; none if empty.
        is_endless: whether it is only ended by ``load_timeout_s``.
    """

    name: str
    write: Write
    reason: str
    config: str = ""
    is_endless: bool = False

    def __str__(self) -> str:
        return self.name


def good_model() -> onnx.ModelProto:
    """A small model that can be served as it is; the broken ones are made of it."""
    rng = weights("good")
    return parse("(float[n, 4] x) => (float[n, 3] y) { y = MatMul (x, w) }", w=normal(rng, 4, 3))


def changed(change: Callable[[onnx.ModelProto], object]) -> Write:
    """Writes the good model after a change to it; without onnx's own checks."""

    def write(folder: Path) -> None:
        model = good_model()
        change(model)
        (folder / MODEL_FILE).write_bytes(model.SerializeToString())

    return write


def _content(make: Callable[[bytes], bytes]) -> Write:
    """Writes what is made of a good model's bytes."""
    return lambda folder: (folder / MODEL_FILE).write_bytes(make(good_model().SerializeToString()))


def _random_bytes(count: int) -> bytes:
    return np.random.default_rng(1).bytes(count)


def _png() -> bytes:
    """One grey pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixel = zlib.compress(b"\0\x80")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def hostile() -> list[Hostile]:
    """All of this module."""
    no_model = r"(?i)not an ONNX model|truncated|damaged"
    contents: dict[str, Callable[[bytes], bytes]] = {
        "truncated": lambda good: good[:-20],
        "cut_in_half": lambda good: good[: len(good) // 2],
        "random_bytes": lambda good: _random_bytes(4096),
        "text": lambda good: b"Put the model here.\n" * 20,
        "page_of_a_web_server": lambda good: b"<!DOCTYPE html><title>404 Not Found</title>",
        "git_lfs_pointer": lambda good: (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
        ),
        "png": lambda good: _png(),
        "gzip": lambda good: gzip.compress(good, mtime=0),
        "zeros": lambda good: bytes(4096),
        "a_graph_alone": lambda good: good_model().graph.SerializeToString(),
        "a_tensor_alone": lambda good: good_model().graph.initializer[0].SerializeToString(),
        "no_graph": lambda good: onnx.ModelProto(ir_version=10).SerializeToString(),
        "bytes_behind_it": lambda good: good + b"\xff" * 64,
        "twice": lambda good: good + good,
    }
    reasons = {"twice": "twice", "a_tensor_alone": f"{no_model}|twice"}
    return [
        Hostile("empty_file", _content(lambda good: b""), "(?i)empty"),
        *(
            Hostile(name, _content(make), reasons.get(name, no_model))
            for name, make in contents.items()
        ),
    ]
