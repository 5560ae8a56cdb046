"""What the fast lane learns from a request that the general parsers understood: a template of all like it.

A body's skeleton is everything in it but tensor data, so what the parsers and checks said of one request
holds for each other one with the same skeleton. `template_of` writes that down: where each input's bytes
come from and go to, and what the answer is made of. Both are found out by trying, not by knowing the
protocol: the body is parsed once more with other numbers in each span, to see which tensor they turn up in,
and the answer is encoded with other bytes in each output, to see where those lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from gateway._kernels.fastlane import (
    BIN,
    FROM_BIN,
    FROM_NUMBERS,
    FROM_TAIL,
    ID,
    NUMBERS,
    Split,
    Template,
)
from gateway.frontend.exchanges import MSGPACK_TYPES, Encode, Encoded, Exchange
from gateway.protocols.call import InferCall, InputTensor, OutputTensor
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.geometry import Placement
from gateway.tensors import element_count

MAX_TRIED_BYTES = 1 << 24
"""Of a body and of its answer: beyond it trying costs more than a template is worth to begin with."""

_NUMBER = re.compile(rb"[-+.0-9eE]+")


def template_of(
    call: InferCall,
    body: bytes,
    split: Split,
    json_bytes: int,
    exchange: Exchange,
    dispatcher: Dispatcher,
    head_of: dict[str, bytes],
) -> Template | None:
    """The template of requests like this one; None where they need the general parsers.

    Args:
        call: checked, and not yet submitted: its data are as they came.
        body: that it came in.
        split: of that body.
        json_bytes: of its text before raw tensors; -1: all of it is text, or msgpack.
        exchange: that understood it.
        dispatcher: of the version that answers.
        head_of: heads of answers, by media type.
    """
    signature = dispatcher.signature
    specs = (*signature.inputs, *signature.outputs)
    if len(body) > MAX_TRIED_BYTES or any(spec.datatype.numpy is None for spec in specs):
        return None
    fit = dispatcher.fit(call)
    placed = fit.key.shape.outputs
    ids = [body[b:e] for b, e, _, kind in split.spans if kind == ID]
    if placed is None or fit.is_padded or ids != ([call.id.encode()] if call.id else []):
        return None
    other, encode = exchange.understand(_marked(body, split), signature)
    sources = _sources(other, split)
    if sources is None or sum(_nbytes(p, call.rows) for p in placed) > MAX_TRIED_BYTES:
        return None
    other.inputs = []
    answer = _Answer(other, call.rows, encode, placed)
    pieces = answer.pieces() if answer.is_raw else None
    return Template(
        key=fit.key,
        rows=call.rows,
        level=fit.level,
        timeout_ns=fit.timeout_ns,
        slo_ns=fit.slo_ns,
        tail_bytes=-1 if json_bytes < 0 else _tail_bytes(sources),
        span_count=len(split.spans),
        sources=tuple(
            (*sources[p.spec.name], p.offset, p.row_bytes, *_numbers(tensor))
            for p in fit.key.shape.inputs
            for tensor in call.inputs
            if tensor.name == p.spec.name
        ),
        head=head_of[answer.example.media_type],
        json_bytes=-1 if answer.example.json_bytes is None else answer.example.json_bytes,
        pieces=pieces or (),
        encode=None if pieces else answer.encode,
        outputs=tuple((p.offset, p.row_bytes, _nbytes(p, call.rows)) for p in placed),
    )


def _marked(body: bytes, split: Split) -> bytes:
    """A body like this one, with one number, the span's own from 1, all over each span."""
    parts, end = [], 0
    for i, (begin, stop, _count, kind) in enumerate(split.spans):
        span = body[begin:stop]
        if kind == NUMBERS:
            span = _NUMBER.sub(b"%d" % (i + 1), span)
        elif kind == BIN:
            span = bytes([i + 1]) * len(span)
        parts += [body[end:begin], span]
        end = stop
    return b"".join([*parts, body[end:]])


def _sources(marked: InferCall, split: Split) -> dict[str, tuple[int, int, int, int]] | None:
    """For each input (kind, span, offset in the tail, bytes); None where a span is not one tensor's data."""
    free = {i for i, span in enumerate(split.spans) if span[3] != ID}
    found: dict[str, tuple[int, int, int, int]] = {}
    at = 0
    for tensor in marked.inputs:
        nbytes = element_count(tensor.shape) * tensor.datatype.itemsize
        is_raw = isinstance(tensor.data, memoryview)
        if is_raw and not any(span[3] == BIN for span in split.spans):
            found[tensor.name] = FROM_TAIL, 0, at, nbytes
            at += nbytes
            continue
        marks = (
            set(tensor.data) if isinstance(tensor.data, memoryview) else set(_leaves(tensor.data))
        )
        i = marks.pop() - 1 if marks else -1
        if marks or i not in free:
            return None
        free.remove(i)
        begin, stop, count, kind = split.spans[i]
        if (stop - begin if kind == BIN else count) != (
            nbytes if is_raw else element_count(tensor.shape)
        ):
            return None
        found[tensor.name] = FROM_BIN if kind == BIN else FROM_NUMBERS, i, 0, nbytes
    return None if free else found


def _leaves(data: Any) -> Iterator[Any]:
    """The numbers in nested lists."""
    if isinstance(data, list):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


def _tail_bytes(sources: dict[str, tuple[int, int, int, int]]) -> int:
    """Raw bytes behind the text."""
    return sum(nbytes for kind, _, _, nbytes in sources.values() if kind == FROM_TAIL)


def _numbers(tensor: InputTensor) -> tuple[int, int, tuple[int, ...] | None]:
    """What reading numbers needs: datatype, count, and the nesting where it matters."""
    dims = tensor.shape if tensor.strict else None
    return tensor.datatype.index, element_count(tensor.shape), dims


def _nbytes(placement: Placement, rows: int) -> int:
    begin, end = placement.span(0, rows)
    return end - begin


class _Answer:
    """What the answers of a template are made of.

    `encode` belongs to the one call that it was made for and repeats that call's id: it is set to each
    request's before its answer is encoded.
    """

    def __init__(
        self, call: InferCall, rows: int, encode: Encode, placements: Sequence[Placement]
    ) -> None:
        self._call, self._rows, self._encode, self._placements = call, rows, encode, placements
        self.has_id = call.id is not None
        self.example = self._try(())

    @property
    def is_raw(self) -> bool:
        """Whether outputs lie in it as they are, and not as text."""
        return self.example.json_bytes is not None or self.example.media_type in MSGPACK_TYPES

    def encode(self, identity: bytes | None, views: Sequence[memoryview]) -> Encoded:
        """One answer, from the bytes of each output."""
        if identity is not None:
            self._call.id = identity.decode()
        return self._encode(
            [
                OutputTensor(p.spec.name, p.spec.datatype, p.dims(self._rows), view)
                for p, view in zip(self._placements, views, strict=True)
            ]
        )

    def pieces(self) -> tuple[object, ...] | None:
        """The body in parts: bytes, (offset, nbytes, row_bytes) of an output, None for the id.

        None where it cannot be put together so.
        """
        body = self.example.body
        cuts: list[tuple[int, int, object]] = []  # begin, end, what lies there
        for i, p in enumerate(self._placements):
            changed = self._try((i,)).body
            if len(changed) != len(body):
                return None
            places = [at for at, (a, b) in enumerate(zip(body, changed, strict=True)) if a != b]
            if not places:
                continue  # not wanted, or without elements
            nbytes = _nbytes(p, self._rows)
            if len(places) != nbytes or places[-1] - places[0] + 1 != nbytes:
                return None
            cuts.append((places[0], places[-1] + 1, (p.offset, nbytes, p.row_bytes)))
        if self.has_id:
            at = self._id_place(body)
            if at is None:
                return None
            cuts.append((at, at, None))
        parts: list[object] = []
        end = 0
        for begin, stop, what in sorted(cuts, key=lambda cut: cut[0]):
            parts += [body[end:begin], what]
            end = stop
        return tuple(part for part in [*parts, body[end:]] if part != b"")

    def _id_place(self, body: bytes) -> int | None:
        """Where an id goes into the body of an empty one; None: it changes more than that."""
        self._call.id = "\x7f"  # which nothing else in it is
        changed = self.encode(None, self._views(())).body
        self._call.id = ""
        at = changed.find(b"\x7f")
        return at if at >= 0 and changed[:at] + changed[at + 1 :] == body else None

    def _try(self, filled: Sequence[int]) -> Encoded:
        """An answer with an empty id whose outputs are zeros, and ones in the filled."""
        if self.has_id:
            self._call.id = ""
        return self.encode(None, self._views(filled))

    def _views(self, filled: Sequence[int]) -> list[memoryview]:
        return [
            memoryview((b"\xff" if i in filled else b"\0") * _nbytes(p, self._rows))
            for i, p in enumerate(self._placements)
        ]
