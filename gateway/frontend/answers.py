"""HTTP answers: the one JSON form of every failure, and the headers that every answer carries."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from gateway.errors import GatewayError, Unauthorized
from gateway.protocols import jsontext
from gateway.serving.routes import Version

log = logging.getLogger("gateway.frontend")

RETRY_AFTER_S = 1
"""What a refused client is told to wait: queues of this gateway drain in well under a second."""

SERVER = "inference-gateway"
"""What the Server header says: no versions for whoever looks for old ones."""

VERSION = web.RequestKey("version", Version)
"""Set on a request once it reached a version."""

DRAINING = web.AppKey("draining", asyncio.Event)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")

_HTTP_TEXT = {404: "Not Found", 405: "Method Not Allowed"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_answer(document: Any, status: int = 200) -> web.Response:
    """A document as JSON."""
    return web.Response(
        body=jsontext.dumps(document), status=status, content_type="application/json"
    )


def error_answer(error: GatewayError) -> web.Response:
    """``{"error": …}``, with `error_headers`."""
    answer = json_answer({"error": error.message}, error.status)
    answer.headers.update(error_headers(error))
    return answer


def error_headers(error: GatewayError) -> dict[str, str]:
    """What an error's answer has in its head, whichever lane writes it: its code, and what would help."""
    headers = {"x-error-code": error.code}
    if error.retryable:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def _http_error_answer(error: web.HTTPException) -> web.StreamResponse:
    answer = json_answer({"error": _HTTP_TEXT.get(error.status, error.reason)}, error.status)
    if "Allow" in error.headers:
        answer.headers["Allow"] = error.headers["Allow"]
    return answer


def request_id(request: web.BaseRequest) -> str:
    """The caller's ``x-request-id`` where it is safe to repeat, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


@web.middleware
async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every failure into JSON and sets the headers of every answer."""
    try:
        answer = await handler(request)
    except GatewayError as error:
        answer = error_answer(error)
    except web.HTTPException as error:
        answer = _http_error_answer(error)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:
        log.exception("a handler failed")
        answer = error_answer(GatewayError("internal error"))
    answer.headers["Server"] = SERVER
    answer.headers["x-request-id"] = request_id(request)
    version = request.get(VERSION)
    if version is not None:
        answer.headers["x-model-version"] = str(version.number)
    if request.app[DRAINING].is_set():
        answer.force_close()
    return answer
