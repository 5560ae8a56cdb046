"""One inference of the aiohttp lane, from handler to batch and back."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.clock import monotonic_ns
from gateway.errors import GatewayError
from gateway.frontend.answers import VERSION
from gateway.frontend.bodies import read_body
from gateway.frontend.exchanges import HEADER_LENGTH, Encode, Encoded, Exchange
from gateway.frontend.mirror import Copy, Mirror
from gateway.protocols.call import InferCall, OutputTensor, check_call
from gateway.serving.request import Timing
from gateway.serving.routes import Choice, Version

CLIENT_GONE = 499
"""What the metrics call a request whose client went away; nothing is sent."""


class Inference:
    """Runs inferences.

    Args:
        max_request_bytes: also bounds what a body expands to as tensors.
        mirror: sends the copies of requests.
    """

    def __init__(self, max_request_bytes: int, mirror: Mirror) -> None:
        self._max_request_bytes = max_request_bytes
        self._mirror = mirror

    async def run(self, http: web.Request, choice: Choice, exchange: Exchange) -> web.Response:
        """Read the body, run it on the version and make the answer.

        Args:
            http: its body has not been read.
            choice: its version is marked on the request, so that the answer names it.
            exchange: the protocol.

        Raises:
            GatewayError: whatever went wrong, with its status.
        """
        version = http[VERSION] = choice.version
        arrived_ns = monotonic_ns()
        try:
            signature = version.begin_request()
            try:
                body = await read_body(http, self._max_request_bytes)
                call, encode = exchange.understand(body, signature)
                check_call(call, signature, self._max_request_bytes)
                copy = self._mirror.keep(choice.shadow, call)
                answer, timing = await self._batched(version, call, encode, copy)
            finally:
                version.end_request()
        except GatewayError as error:
            choice.counters.failed(error.status, monotonic_ns() - arrived_ns)
            raise
        except asyncio.CancelledError:
            choice.counters.failed(CLIENT_GONE, monotonic_ns() - arrived_ns)
            raise
        total_ns = monotonic_ns() - arrived_ns
        choice.counters.answered(call.rows, total_ns, timing.queue_ns, timing.compute_ns)
        return _response(answer)

    async def _batched(
        self, version: Version, call: InferCall, encode: Encode, copy: Copy | None
    ) -> tuple[Encoded, Timing]:
        dispatcher = version.dispatcher
        if dispatcher is None:
            raise version.refusal()  # the body took longer than the version lasted
        done: asyncio.Future[tuple[Encoded, Timing]] = asyncio.get_running_loop().create_future()

        def on_answer(outputs: list[OutputTensor], timing: Timing) -> None:
            answer = encode(outputs)
            if not done.done():
                done.set_result((answer, timing))
                self._mirror.answered(copy, outputs)

        def on_error(error: GatewayError) -> None:
            if not done.done():
                done.set_exception(error)

        # Its time in the queue begins here: a slow upload is not the queue's doing.
        request = dispatcher.submit(call, monotonic_ns(), on_answer, on_error)
        try:
            return await done
        except asyncio.CancelledError:
            dispatcher.cancel(request)
            raise


def _response(answer: Encoded) -> web.Response:
    response = web.Response(body=answer.body, content_type=answer.media_type)
    if answer.json_bytes is not None:
        response.headers[HEADER_LENGTH] = str(answer.json_bytes)
    return response
