"""The client for asyncio, which `synchronous` wraps."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote

from gateway.client.addresses import Address, Addresses, parse_addresses
from gateway.client.encoding import (
    ENCODINGS,
    HEADER_LENGTH,
    Answer,
    Array,
    Encoding,
    decode_infer,
    encode_infer,
    load_json,
)
from gateway.client.errors import BadAnswer
from gateway.client.failover import Failover, Request, Waiting
from gateway.client.transport import HttpTransport
from gateway.errors import GatewayError, InvalidRequest

_HEADER_ID = re.compile(r"[A-Za-z0-9_.:/+=@-]{1,128}")
"""Request ids that the gateway also takes as the header x-request-id."""


class AsyncClient:
    """Asks one or several gateways (or other servers of the Open Inference Protocol v2).

    Use it as an asynchronous context manager. Tasks may share one; they all use its connections.

    Args:
        addresses: ``host:port`` or ``http[s]://host[:port][/base]``. Several are asked in turn; one
            that refuses connections or answers 503 is passed over for a time.
        encoding: how tensors travel. JSON has no form for float16, bfloat16 and bytes that are not
            UTF-8.
        timeout_s: for each call, with all its retries; a call may set its own.
        connections: most connections to one address at a time.
        retries: how often a call may be sent once more after 429, 503 (each after its Retry-After) or
            a lost connection. The server may have run the request whose connection was lost; that is
            safe, an inference changes nothing. 0 switches all of that off; an address that refuses the
            connection is passed over even then.
        headers: sent with every request.
        waiting: clock and sleep; for tests.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        encoding: Encoding = "binary",
        timeout_s: float = 30.0,
        connections: int = 100,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"'encoding' must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        if connections < 1 or retries < 0 or not 0 < timeout_s < float("inf"):
            raise ValueError("expected 'connections' >= 1, 'retries' >= 0, 'timeout_s' > 0")
        self._addresses = Addresses(parse_addresses(addresses))
        self._encoding: Encoding = encoding
        self._timeout_s = timeout_s
        self._connections = connections
        self._retries = retries
        self._headers = dict(headers or {})
        self._waiting = waiting or Waiting()
        self._transport: HttpTransport | None = None

    async def __aenter__(self) -> AsyncClient:
        if self._transport is None:
            self._transport = HttpTransport(self._connections, self._headers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; the client may be entered again."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        request_id: str | None = None,
        queue_timeout_s: float | None = None,
        priority: int | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Run a model on arrays.

        Args:
            model: its name.
            inputs: an array for every input that has no default, the first dim being rows where the
                model is batched. Its dtype says the datatype: bool, intN, uintN, float16/32/64,
                ml_dtypes.bfloat16, or BYTES for S, U and object (elements bytes or str; NumPy cuts
                NULs off the end of S and U). Layout and byte order are converted, dtypes are not.
            version: None: the one that the server routes to.
            outputs: names of those wanted; None or empty: all.
            request_id: comes back in the answer and names the request in the server's log.
            queue_timeout_s: the longest that it may wait for a worker; None: the model's own.
            priority: 1 is the highest; None or 0: the model's default.
            timeout_s: for this call, in place of the client's.

        Raises:
            InvalidRequest: the request is wrong, said by the client or by the server. In JSON it is
                also the server's refusal to answer with strings that are not UTF-8.
            NotFound: no such model or version.
            QueueFull: 429 to the end of the retries, or of the time.
            Unavailable: 503 likewise; its `ConnectionFailed`: no address answers.
            DeadlineExceeded: no answer within ``timeout_s``, or too long in the queue.
            InferenceFailed: the model failed on this request.
            BadAnswer: the answer is not one of the protocol.
            GatewayError: every other refusal.
        """
        body, headers = encode_infer(
            self._encoding,
            inputs,
            outputs=outputs,
            request_id=request_id,
            queue_timeout_s=queue_timeout_s,
            priority=priority,
        )
        if request_id is not None and _HEADER_ID.fullmatch(request_id):
            headers["x-request-id"] = request_id
        path = f"{_model_path(model, version)}/infer"
        reply = await self._failover().send(
            Request("POST", path, body, headers), self._deadline_s(timeout_s)
        )
        return decode_infer(
            reply.body,
            reply.content_type,
            reply.headers.get(HEADER_LENGTH),
            reply.headers.get("x-request-id"),
        )

    async def live(self, *, timeout_s: float | None = None) -> bool:
        """Whether any address answers that it is up. Never retried."""
        return await self._any_ok("/v2/health/live", timeout_s)

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether any address answers that it is ready for requests. Never retried."""
        return await self._any_ok("/v2/health/ready", timeout_s)

    async def model_ready(
        self, model: str, version: int | str | None = None, *, timeout_s: float | None = None
    ) -> bool:
        """Whether the model is ready at any address; False also where none knows it. Never retried."""
        return await self._any_ok(f"{_model_path(model, version)}/ready", timeout_s)

    async def metadata(
        self, model: str, version: int | str | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Names, datatypes and shapes of the model's inputs and outputs, from one address.

        Raises:
            GatewayError: as `infer`.
        """
        return await self._document(_model_path(model, version), timeout_s)

    async def statistics(
        self, model: str | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """What the model, or every model, has done, as counted by one address (not summed).

        Raises:
            GatewayError: as `infer`.
        """
        path = "/v2/models/stats" if model is None else f"{_model_path(model, None)}/stats"
        return await self._document(path, timeout_s)

    async def _document(self, path: str, timeout_s: float | None) -> dict[str, Any]:
        reply = await self._failover().send(Request("GET", path), self._deadline_s(timeout_s))
        try:
            document = load_json(reply.body)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise BadAnswer("expected a JSON object as answer")
        return document

    async def _any_ok(self, path: str, timeout_s: float | None) -> bool:
        """Whether any address answers 200; all are asked at once, the first such answer decides."""
        transport, limit_s = self._open_transport(), self._deadline_s(timeout_s)

        async def ok(address: Address) -> bool:
            try:
                return (await transport.send(address, Request("GET", path), limit_s)).status == 200
            except (GatewayError, TimeoutError):
                return False

        tasks = [asyncio.create_task(ok(address)) for address in self._addresses.all]
        try:
            for task in asyncio.as_completed(tasks):
                if await task:
                    return True
            return False
        finally:
            for left in tasks:
                left.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _failover(self) -> Failover:
        return Failover(self._addresses, self._open_transport(), self._retries, self._waiting)

    def _open_transport(self) -> HttpTransport:
        if self._transport is None:
            raise RuntimeError("the client is closed: use it inside of 'async with'")
        return self._transport

    def _deadline_s(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return self._timeout_s
        if not 0 < timeout_s < float("inf"):
            raise InvalidRequest("'timeout_s' must be a positive number of seconds")
        return timeout_s


def _model_path(model: str, version: int | str | None) -> str:
    """The path of a model. InvalidRequest: the name would lead elsewhere."""
    if model in ("", ".", ".."):
        raise InvalidRequest("the name of a model must not be empty, '.' or '..'")
    path = f"/v2/models/{quote(model, safe='')}"
    if version is None:
        return path
    if not re.fullmatch(r"[0-9]{1,19}", str(version)):
        raise InvalidRequest("'version' must be a whole number")
    return f"{path}/versions/{version}"
