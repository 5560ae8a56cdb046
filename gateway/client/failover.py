"""Sends a request until it is answered: which failures are tried again, where and when.

Tried again: a refused connection (nothing was sent), 429 and 503 (the server says so, with Retry-After),
and a connection that was lost after sending. The last is right because an inference, like every other
request that this client sends, is idempotent: running it twice changes nothing but the time spent.

A call never sleeps past its deadline: where the next try would come too late, it fails at once, with what
went wrong last.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Protocol

from gateway import clock
from gateway.client.addresses import Address, Addresses, backoff_ns
from gateway.client.encoding import load_json
from gateway.client.errors import ConnectionFailed, ConnectionLost, from_status
from gateway.clock import NS_PER_MS, NS_PER_S
from gateway.errors import DeadlineExceeded, GatewayError, QueueFull, Unavailable

JITTER = 0.1
"""The part of a wait by which it is lengthened at random, so that not all come back at once."""

_MAX_RETRY_AFTER_DIGITS = 9
"""Digits of the longest Retry-After that is read as a number of seconds (31 years)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``path`` begins with a slash and is quoted. ``body`` None: it has none."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. ``headers`` is indifferent to case; ``content_type`` has no parameters."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    content_type: str = ""

    def error(self) -> GatewayError:
        """The error that it stands for, where its status is not 200."""
        text: object = None
        try:
            document = load_json(self.body)
            text = document.get("error") if isinstance(document, dict) else None
        except ValueError:
            pass
        message = text if isinstance(text, str) and text else f"HTTP status {self.status}"
        return from_status(self.status, message, self.headers.get("x-error-code"))


class Transport(Protocol):
    """Sends one request to one address, once."""

    async def send(self, address: Address, request: Request, timeout_s: float) -> Reply:
        """The reply, whatever its status.

        Raises:
            ConnectionFailed: nothing was sent.
            ConnectionLost: something was.
            TimeoutError: no reply in time.
        """
        ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """How a client tells the time and waits; tests have their own.

    ``jitter`` gives numbers from 0 to 1.
    """

    clock_ns: Callable[[], int] = clock.monotonic_ns
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    jitter: Callable[[], float] = random.random


class Failover:
    """Sends requests to whichever address answers.

    Args:
        addresses: where to.
        transport: how.
        retries: how often a call may be sent once more. Going to an address that the call has not
            tried yet because another refused the connection is free: nothing had been sent.
        waiting: time.
    """

    def __init__(
        self, addresses: Addresses, transport: Transport, retries: int, waiting: Waiting
    ) -> None:
        self._addresses = addresses
        self._transport = transport
        self._retries = retries
        self._waiting = waiting

    async def send(self, request: Request, timeout_s: float) -> Reply:
        """The reply of status 200 to a request.

        Args:
            request: safe to run twice.
            timeout_s: for all of it, waits included.

        Raises:
            GatewayError: what the server answered, or `ConnectionFailed`, or `DeadlineExceeded`.
        """
        call = _Call(self._waiting.clock_ns() + round(timeout_s * NS_PER_S), self._retries)
        while True:
            now_ns = self._waiting.clock_ns()
            address, start_ns = self._addresses.pick(call.waits_ns, now_ns)
            call.claim_attempt(address, start_ns)
            if start_ns > now_ns:
                wait_s = (start_ns - now_ns) / NS_PER_S * (1 + JITTER * self._waiting.jitter())
                await self._waiting.sleep(min(wait_s, (call.deadline_ns - now_ns) / NS_PER_S))
                now_ns = self._waiting.clock_ns()
            left_s = (call.deadline_ns - now_ns) / NS_PER_S
            epoch = self._addresses.asked(address, now_ns)
            try:
                if left_s <= 0:
                    raise TimeoutError
                reply = await self._transport.send(address, request, left_s)
            except TimeoutError:
                raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from call.error
            except ConnectionFailed as error:
                self._note_unanswered(call, address, epoch, error)
                continue
            if reply.status == 200:
                self._addresses.answered(address, epoch)
                return reply
            self._note_refusal(call, address, epoch, reply)

    def _note_unanswered(
        self, call: _Call, address: Address, epoch: int, error: ConnectionFailed
    ) -> None:
        now_ns = self._waiting.clock_ns()
        if isinstance(error, ConnectionLost):
            # Often just a kept-alive connection that the server closed: the first try is at once.
            again_ns = now_ns + (backoff_ns(call.tries(address)) if call.tries(address) else 0)
        else:
            again_ns = self._addresses.failed(address, epoch, now_ns)
        call.failed(address, again_ns, error)

    def _note_refusal(self, call: _Call, address: Address, epoch: int, reply: Reply) -> None:
        """Take notice of a reply other than 200. GatewayError: it is final."""
        error = reply.error()
        now_ns = self._waiting.clock_ns()
        retry_after_ns = _retry_after_ns(reply.headers.get("Retry-After"))
        if isinstance(error, Unavailable):
            aside_ns = self._addresses.failed(address, epoch, now_ns, retry_after_ns or 0)
            again_ns = aside_ns if retry_after_ns is None else now_ns + retry_after_ns
        else:
            self._addresses.answered(address, epoch)
            if not isinstance(error, QueueFull):
                raise error
            backoff = backoff_ns(call.tries(address) + 1)
            again_ns = now_ns + (backoff if retry_after_ns is None else retry_after_ns)
        call.failed(address, again_ns, error)


class _Call:
    """What one call has tried: ``waits_ns`` has when each address that failed may be tried again."""

    def __init__(self, deadline_ns: int, retries: int) -> None:
        self.deadline_ns = deadline_ns
        self.waits_ns: dict[Address, int] = {}
        self.error: GatewayError | None = None
        self._retries_left = retries
        self._tries: dict[Address, int] = {}
        self._only_refused = True

    def tries(self, address: Address) -> int:
        """How often the address has failed this call."""
        return self._tries.get(address, 0)

    def failed(self, address: Address, again_ns: int, error: GatewayError) -> None:
        """Note a failure after which the call may go on."""
        self._tries[address] = self.tries(address) + 1
        self.waits_ns[address] = again_ns
        refused = type(error) is ConnectionFailed
        self._only_refused = refused and self._only_refused
        # Of several failures the one that says most is shown: the last that had an answer.
        if self.error is None or not refused:
            self.error = error

    def claim_attempt(self, address: Address, start_ns: int) -> None:
        """Take one attempt from the budget. GatewayError: there is none, or it would be too late."""
        if self.error is None or (self._only_refused and address not in self.waits_ns):
            return
        if not self._retries_left or start_ns >= self.deadline_ns:
            raise self.error
        self._retries_left -= 1


def _retry_after_ns(value: str | None) -> int | None:
    """A Retry-After, in seconds or as a date (RFC 9110, 10.2.3); None where it says nothing."""
    if value is None:
        return None
    if value.isascii() and value.isdigit() and len(value) <= _MAX_RETRY_AFTER_DIGITS:
        return int(value) * NS_PER_S
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0, round(when.timestamp() * 1000) - clock.wall_ms()) * NS_PER_MS
