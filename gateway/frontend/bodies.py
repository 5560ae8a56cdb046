"""Reads a request's body, decompressed, within the limit.

aiohttp could decompress, but takes a gzip body that was cut short for a whole one, ignores encodings that
it does not know, answers a cut deflate body by itself (as text, not as our JSON), and logs a traceback
for every bad one.
"""

from __future__ import annotations

import asyncio
import zlib

from aiohttp import web

from gateway.errors import InvalidRequest, TooLarge, UnsupportedMediaType

_GZIP, _ZLIB, _RAW = zlib.MAX_WBITS | 16, zlib.MAX_WBITS, -zlib.MAX_WBITS

_ZLIB_METHOD = 8  # in the low bits of a zlib stream's first byte


async def read_body(http: web.Request, max_bytes: int) -> bytes:
    """The whole body of a request, decompressed.

    Args:
        http: its body has not been read, and aiohttp does not decompress it.
        max_bytes: the setting max_request_bytes, for the body as sent and decompressed.

    Raises:
        TooLarge: over the limit, which is named.
        InvalidRequest: it ends too early, or what it holds is not what its encoding says.
        UnsupportedMediaType: an encoding other than gzip and deflate.
    """
    encoding = http.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise UnsupportedMediaType("Content-Encoding must be gzip or deflate")
    length = http.content_length
    if length is not None and length > max_bytes:
        raise _too_large(max_bytes)
    try:
        body = await http.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(max_bytes) from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body could not be read to its end") from None
    if encoding == "identity" or not body:
        return body
    return await asyncio.to_thread(decompress, body, encoding, max_bytes)


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The content of a gzip body (of one member) or a deflate body (in zlib's form or raw).

    Raises:
        TooLarge: it holds more than ``max_bytes``; no more than that was decompressed.
        InvalidRequest: it is corrupt or incomplete, or something follows it.
    """
    form = _GZIP
    if encoding == "deflate":
        form = _ZLIB if body[0] & 0x0F == _ZLIB_METHOD else _RAW
    stream = zlib.decompressobj(form)
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error:
        raise _corrupt(encoding) from None
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    if not stream.eof or stream.unused_data:
        raise _corrupt(encoding)
    return content


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than max_request_bytes ({max_bytes})")


def _corrupt(encoding: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not what Content-Encoding {encoding} says, or cut short")
