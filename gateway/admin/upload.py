"""Takes a model file as a body: in pieces, to a file beside the repository, with its digest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from aiohttp import hdrs, web

from gateway.admin.endpoint import BODY_S, go_on
from gateway.errors import InvalidRequest, TooLarge, Unavailable, UnsupportedMediaType

MAX_UPLOADS = 4
"""Uploads at the same time; each may take max_artifact_bytes of the disk."""

PIECE_BYTES = 1 << 18
"""Most that is written at a time."""

DIGEST_HEADER = "x-content-sha256"

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Uploads:
    """Receives files.

    Args:
        max_bytes: the setting max_artifact_bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._count = 0

    @asynccontextmanager
    async def receive(self, http: web.Request, folder: Path) -> AsyncIterator[Path]:
        """The body of a request as a whole file, which is removed unless it was moved away.

        Args:
            http: its body has not been read.
            folder: where to.

        Raises:
            TooLarge: over the limit, which is named.
            InvalidRequest: it is empty, ends too early, or has another digest than its header says.
            UnsupportedMediaType: it is encoded.
            Unavailable: there are too many uploads, or no room on the disk.
            web.HTTPRequestTimeout: nothing came for too long.
        """
        expected = http.headers.get(DIGEST_HEADER)
        if expected is not None and not _DIGEST.fullmatch(expected.lower()):
            raise InvalidRequest(f"{DIGEST_HEADER} must be a SHA-256 in hex")
        if hdrs.CONTENT_ENCODING in http.headers:
            raise UnsupportedMediaType("send the file as it is, without Content-Encoding")
        if (http.content_length or 0) > self._max_bytes:
            raise self._too_large()
        if self._count >= MAX_UPLOADS:
            raise Unavailable(f"{MAX_UPLOADS} uploads are under way already")
        self._count += 1
        path: Path | None = None
        try:
            try:
                number, name = await asyncio.to_thread(tempfile.mkstemp, ".onnx", "upload-", folder)
                path = Path(name)
                with os.fdopen(number, "wb") as file:
                    await go_on(http)
                    digest = await self._copy(http, file)
            except OSError as error:
                reason = error.strerror or "the connection or the disk failed"
                raise Unavailable(f"the upload could not be kept: {reason}") from None
            if expected is not None and digest != expected.lower():
                raise InvalidRequest(f"the body is not what {DIGEST_HEADER} says: send it again")
            yield path
        finally:
            self._count -= 1
            if path is not None:
                path.unlink(missing_ok=True)

    async def _copy(self, http: web.Request, file: BinaryIO) -> str:
        """Write the body to the disk; its digest in hex."""
        digest = hashlib.sha256()
        nbytes = 0
        while piece := await _read(http):
            nbytes += len(piece)
            if nbytes > self._max_bytes:
                raise self._too_large()
            await asyncio.to_thread(_write, file, piece, digest)
        if not nbytes:
            raise InvalidRequest("the body is empty: send the .onnx file")
        await asyncio.to_thread(_sync, file)
        return digest.hexdigest()

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than max_artifact_bytes ({self._max_bytes})")


async def _read(http: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            return await http.content.read(PIECE_BYTES)
    except web.RequestPayloadError:
        raise InvalidRequest("the body could not be read to its end") from None
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


def _write(file: BinaryIO, piece: bytes, digest: hashlib._Hash) -> None:
    file.write(piece)
    digest.update(piece)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
