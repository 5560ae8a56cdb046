"""What the fast lane learns from a request that the general parsers understood: a template of all like it.

A body's skeleton is everything in it but tensor data, so what the parsers and checks said of one request
holds for each other one with the same skeleton. `template_of` writes that down: where each input's bytes
come from and go to, and what the answer is made of. Both are found out by trying, not by knowing the
protocol: the body is parsed again with other numbers in each span, to see which tensor they turn up in,
and the answer is encoded with other bytes in each output, to see where those lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gateway._kernels.templates import (
    BIN,
    FROM_BIN,
    FROM_NUMBERS,
    FROM_TAIL,
    ID,
    MAX_PIECES,
    NUMBERS,
    Split,
    Template,
)
from gateway.frontend.exchanges import MSGPACK_TYPES, Encode, Encoded, Exchange
from gateway.protocols.call import InferCall, InputTensor, OutputTensor
from gateway.protocols.jsontext import dumps_tensors, tensor_data
from gateway.serving.dispatcher import Dispatcher, Fit
from gateway.serving.geometry import Placement
from gateway.tensors import DataType, element_count

if TYPE_CHECKING:
    from typing_extensions import Buffer

Writer = Callable[[bytes], bytes]
"""Makes text of an output's bytes."""

MAX_TRIED_BYTES = 1 << 22
"""Of a text or an answer: trying a larger one would hold the event loop for milliseconds."""


def template_of(
    call: InferCall,
    body: bytes,
    split: Split,
    json_bytes: int,
    exchange_of: Callable[[int], Exchange],
    dispatcher: Dispatcher,
    head_of: dict[str, bytes],
) -> Template | None:
    """The template of requests like this one; None where they need the general parsers.

    Args:
        call: checked, and not yet submitted: its data are as they came.
        body: that it came in.
        split: of that body.
        json_bytes: of its text before raw tensors; -1: all of it is text, or msgpack.
        exchange_of: understands a body with a text of so many bytes.
        dispatcher: of the version that answers.
        head_of: heads of answers, by media type.

    Raises:
        InvalidRequest: the body cannot be tried out, which says nothing against it.
    """
    fit = _fit(call, body, split, json_bytes, dispatcher)
    if fit is None:
        return None
    signature, placed = dispatcher.signature, fit.key.shape.outputs

    def understand(marked: bytes, text_bytes: int) -> InferCall:
        return exchange_of(text_bytes).understand(marked, signature)[0]

    found = _sources(body, split, understand, json_bytes)
    if found is None:
        return None
    tensors = {tensor.name: tensor for tensor in call.inputs}
    sources = [
        _source(*found[p.spec.name], tensors[p.spec.name], p, split) for p in fit.key.shape.inputs
    ]
    fitting = tuple(source for source in sources if source is not None)
    if len(fitting) < len(sources):
        return None
    marked, text_bytes = _mark(body, split, 1, json_bytes)
    again, encode = exchange_of(text_bytes).understand(marked, signature)
    again.inputs = []
    answer = _Answer(again, call.rows, encode, placed)
    pieces = answer.pieces()
    example = answer.example
    return Template(
        key=fit.key,
        rows=call.rows,
        level=fit.level,
        timeout_ns=fit.timeout_ns,
        slo_ns=fit.slo_ns,
        tail_bytes=-1 if json_bytes < 0 else len(body) - json_bytes,
        span_count=len(split.spans),
        sources=fitting,
        head=head_of[example.media_type],
        json_bytes=-1 if example.json_bytes is None else example.json_bytes - answer.text_bytes,
        pieces=pieces or (),
        encode=None if pieces else answer.encode,
        outputs=tuple((p.offset, p.row_bytes, _nbytes(p, call.rows)) for p in placed),
    )


def _fit(
    call: InferCall, body: bytes, split: Split, json_bytes: int, dispatcher: Dispatcher
) -> Fit | None:
    """What the call has in common with those like it; None where a template could not serve them."""
    signature = dispatcher.signature
    if any(spec.datatype.numpy is None for spec in (*signature.inputs, *signature.outputs)):
        return None
    fit = dispatcher.fit(call)
    placed = fit.key.shape.outputs
    ids = [body[b:e] for b, e, _, kind in split.spans if kind == ID]
    if placed is None or fit.is_padded or ids != ([call.id.encode()] if call.id else []):
        return None
    text = len(body) if json_bytes < 0 else json_bytes
    if max(text, sum(_nbytes(p, call.rows) for p in placed)) > MAX_TRIED_BYTES:
        return None
    return fit


def _sources(
    body: bytes, split: Split, understand: Callable[[bytes, int], InferCall], json_bytes: int
) -> dict[str, tuple[int, int, int]] | None:
    """For each input where its data come from: kind, span, and offset in the tail.

    The body is parsed with one number in the place of each span, twice and with other numbers, to see
    what turns up where. None where a span is not the data of exactly one tensor.

    Args:
        body: the request's.
        split: of it.
        understand: parses a body with a text of so many bytes.
        json_bytes: of this body's text; -1: all of it.
    """
    count = len(split.spans)
    found = []
    for first in (1, 1 + count):
        marked, text_bytes = _mark(body, split, first, json_bytes)
        found.append(_find_marks(understand(marked, text_bytes), split, first))
    return found[0] if found[0] == found[1] else None


def _mark(body: bytes, split: Split, first: int, json_bytes: int) -> tuple[bytes, int]:
    """A body with a number, the first or one of those behind it, in the place of each span."""
    parts, end = [], 0
    for i, (begin, stop, _count, kind) in enumerate(split.spans):
        span = body[begin:stop]
        if kind == NUMBERS:
            span = b"[%d]" % (first + i)
        elif kind == BIN:
            span = bytes([first + i]) * len(span)
        if json_bytes >= 0:
            json_bytes += len(span) - (stop - begin)
        parts += [body[end:begin], span]
        end = stop
    return b"".join([*parts, body[end:]]), json_bytes


def _find_marks(
    marked: InferCall, split: Split, first: int
) -> dict[str, tuple[int, int, int]] | None:
    free = {i for i, span in enumerate(split.spans) if span[3] != ID}
    has_bins = any(span[3] == BIN for span in split.spans)
    found: dict[str, tuple[int, int, int]] = {}
    at = 0
    for tensor in marked.inputs:
        data = tensor.data
        if isinstance(data, memoryview) and not has_bins:
            found[tensor.name] = FROM_TAIL, 0, at
            at += data.nbytes
            continue
        mark = data[0] if len(data) > 0 else None
        i = mark - first if type(mark) is int else -1
        if i not in free:
            return None
        kind = BIN if isinstance(data, memoryview) else NUMBERS
        whole = bytes([first + i]) * len(data) if kind == BIN else [first + i]
        if split.spans[i][3] != kind or data != whole:
            return None
        free.remove(i)
        found[tensor.name] = FROM_BIN if kind == BIN else FROM_NUMBERS, i, 0
    return None if free else found


def _source(
    kind: int, span: int, at: int, tensor: InputTensor, placement: Placement, split: Split
) -> tuple[object, ...] | None:
    """One of a template's sources; None where the span has another size."""
    elements = element_count(tensor.shape)
    nbytes = elements * tensor.datatype.itemsize
    begin, end, count, _ = split.spans[span] if kind != FROM_TAIL else (0, nbytes, elements, 0)
    if (count if kind == FROM_NUMBERS else end - begin) != (
        elements if kind == FROM_NUMBERS else nbytes
    ):
        return None
    dims = tensor.shape if tensor.strict else None
    place = placement.offset, placement.row_bytes
    return kind, span, at, nbytes, tensor.datatype.index, elements, dims, *place


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
        self.text_bytes = 0  # of the example's outputs that are written as text
        self.example = self._try(())

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
        """The body in parts: bytes, (offset, nbytes, row_bytes, writer) of an output, None for the id.

        None where it cannot be put together so.
        """
        body = self.example.body
        cuts: list[tuple[int, int, object]] = []  # begin, end, what lies there
        for i, p in enumerate(self._placements):
            changed = self._try((i,)).body
            if changed == body:
                continue  # not wanted, or without elements
            found = self._raw_place(i, changed) or self._text_place(i, changed)
            if found is None:
                return None
            begin, end, writer = found
            cuts.append((begin, end, (p.offset, _nbytes(p, self._rows), p.row_bytes, writer)))
        if self.has_id:
            at = self._id_place(body)
            if at is None:
                return None
            cuts.append((at, at, None))
        parts: list[object] = []
        at = 0
        for begin, end, what in sorted(cuts, key=lambda cut: cut[:2]):
            parts += [body[at:begin], what]
            at = end
        whole = tuple(part for part in [*parts, body[at:]] if part != b"")
        return whole if len(whole) <= MAX_PIECES else None

    def _raw_place(self, i: int, changed: bytes) -> tuple[int, int, Writer | None] | None:
        """Where the bytes of an output lie in the body; ``changed``: with other ones there."""
        body = self.example.body
        if self._is_text() or len(changed) != len(body):
            return None
        places = np.flatnonzero(np.frombuffer(body, np.uint8) != np.frombuffer(changed, np.uint8))
        nbytes = _nbytes(self._placements[i], self._rows)
        if len(places) != nbytes or places[-1] - places[0] + 1 != nbytes:
            return None
        return int(places[0]), int(places[-1]) + 1, None

    def _text_place(self, i: int, changed: bytes) -> tuple[int, int, Writer | None] | None:
        """Where an output is written as numbers, and what writes it."""
        body, p = self.example.body, self._placements[i]
        for dims in (None, p.dims(self._rows)):
            write = partial(_numbers_text, p.spec.datatype, dims)
            before, after = (write(view) for view in (self._views(())[i], self._views((i,))[i]))
            at = body.find(before)
            while at >= 0:
                if body[:at] + after + body[at + len(before) :] == changed:
                    self.text_bytes += len(before)
                    return at, at + len(before), write
                at = body.find(before, at + 1)
        return None

    def _is_text(self) -> bool:
        """Whether nothing in the body is raw: equal lengths would be chance."""
        return self.example.json_bytes is None and self.example.media_type not in MSGPACK_TYPES

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
            memoryview((b"\x01" if i in filled else b"\0") * _nbytes(p, self._rows))
            for i, p in enumerate(self._placements)
        ]


def _numbers_text(datatype: DataType, dims: tuple[int, ...] | None, data: Buffer) -> bytes:
    """An output's numbers as JSON: flat, or nested as its dims say."""
    return dumps_tensors(tensor_data(datatype, memoryview(data), dims))
