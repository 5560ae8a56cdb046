"""What ``gateway bench`` asks a server besides inferences: its models, their inputs, its own counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from gateway.client.addresses import parse_addresses
from gateway.client.encoding import load_json
from gateway.client.errors import BadAnswer
from gateway.client.failover import Reply, Request
from gateway.client.load_inputs import InputSpec, parse_inputs
from gateway.client.transport import HttpTransport
from gateway.clock import NS_PER_MS
from gateway.errors import (
    ConfigurationError,
    GatewayError,
    InvalidRequest,
    NotFound,
    NotSupported,
)

ASK_TIMEOUT_S = 10.0
"""For each question; inferences have their own."""

MAX_LISTED = 30
"""Most models that an error text names."""

_SPENT = ("success", "queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True, slots=True)
class Counters:
    """A model's statistics at one moment, all the versions asked for added up.

    ``rows`` and ``batches`` are counts; ``spent`` has count and nanoseconds of each kind of time.
    """

    rows: int
    batches: int
    spent: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """Where a request's time went, as the server counts it: means in milliseconds.

    ``total_ms`` is all of a request's time in the server; ``mean_batch_rows`` is None where the server
    counts no batches.
    """

    mean_batch_rows: float | None
    queue_ms: float
    compute_input_ms: float
    compute_infer_ms: float
    compute_output_ms: float
    total_ms: float


class BenchedServer:
    """Asks one server. Made inside of a running event loop, and closed there.

    Raises:
        ConfigurationError: ``url`` cannot be read.
    """

    def __init__(self, url: str) -> None:
        try:
            (self._address,) = parse_addresses(url)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        self.url = self._address.url
        self._transport = HttpTransport(1, {})

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close()

    async def ask(self, request: Request, timeout_s: float = ASK_TIMEOUT_S) -> Reply:
        """The reply of status 2xx. GatewayError: the server refuses or does not answer."""
        try:
            reply = await self._transport.send(self._address, request, timeout_s)
        except TimeoutError:
            raise GatewayError(f"{self.url} does not answer within {timeout_s:g} s") from None
        if not 200 <= reply.status < 300:
            error = reply.error()
            raise type(error)(f"{self.url} answers {reply.status}: {printable(error.message)}")
        return reply

    async def choose_model(self) -> str:
        """The name of the only model that is ready. GatewayError: there are none or several."""
        headers = {"Content-Type": "application/json"}
        try:
            reply = await self.ask(Request("POST", "/v2/repository/index", b"{}", headers))
            names = _ready_models(_parsed(reply))
        except (NotFound, InvalidRequest, NotSupported, BadAnswer) as error:
            advice = "say which model to load with --model"
            raise type(error)(f"{error.message}; {advice}") from None
        if len(names) == 1:
            return names[0]
        if not names:
            raise ConfigurationError(f"no model is ready at {self.url}")
        listed = ", ".join(names[:MAX_LISTED]) + ", …" * (len(names) > MAX_LISTED)
        raise ConfigurationError(f"{self.url} serves several models: choose with --model: {listed}")

    async def inputs(self, model_path: str) -> tuple[InputSpec, ...]:
        """The inputs of ``/{model}[/versions/{version}]``. GatewayError: there is no such model."""
        document = _parsed(await self.ask(Request("GET", f"/v2/models{model_path}")))
        return parse_inputs(document if isinstance(document, dict) else {})

    async def counters(self, model_path: str) -> Counters | None:
        """The model's statistics now; None where the server has none."""
        try:
            reply = await self.ask(Request("GET", f"/v2/models{model_path}/stats"))
            return parse_counters(_parsed(reply))
        except GatewayError:
            return None


def model_path(model: str, version: int | None) -> str:
    """``/{model}[/versions/{version}]``, quoted. ConfigurationError: the name would lead elsewhere."""
    if model in ("", ".", ".."):
        raise ConfigurationError("the name of a model must not be empty, '.' or '..'")
    return f"/{quote(model, safe='')}" + (f"/versions/{version}" if version is not None else "")


def parse_counters(document: Any) -> Counters | None:
    """The counters in a statistics document (Triton's extension); None where it is none."""
    try:
        entries = document["model_stats"]
        spent = {
            kind: (
                sum(
                    int(entry["inference_stats"].get(kind, {}).get("count", 0)) for entry in entries
                ),
                sum(int(entry["inference_stats"].get(kind, {}).get("ns", 0)) for entry in entries),
            )
            for kind in _SPENT
        }
        return Counters(
            sum(int(entry.get("inference_count", 0)) for entry in entries),
            sum(int(entry.get("execution_count", 0)) for entry in entries),
            spent,
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def times_between(before: Counters | None, after: Counters | None) -> ServerTimes | None:
    """What the server counted between two moments; None where it finished no request."""
    if before is None or after is None:
        return None
    requests = after.spent["success"][0] - before.spent["success"][0]
    if requests <= 0:
        return None
    means_ms = {
        kind: (after.spent[kind][1] - before.spent[kind][1]) / requests / NS_PER_MS
        for kind in _SPENT
    }
    batches = after.batches - before.batches
    return ServerTimes(
        mean_batch_rows=(after.rows - before.rows) / batches if batches > 0 else None,
        queue_ms=means_ms["queue"],
        compute_input_ms=means_ms["compute_input"],
        compute_infer_ms=means_ms["compute_infer"],
        compute_output_ms=means_ms["compute_output"],
        total_ms=means_ms["success"],
    )


def printable(text: str) -> str:
    """Text on one line; what a server says cannot steer the terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _ready_models(index: Any) -> list[str]:
    """Names in a repository index, once each. BadAnswer: it is none."""
    try:
        return sorted(
            {printable(str(e["name"])) for e in index if e.get("state", "READY") == "READY"}
        )
    except (LookupError, TypeError, AttributeError):
        raise BadAnswer("the server's list of models is malformed") from None


def _parsed(reply: Reply) -> Any:
    try:
        return load_json(reply.body)
    except ValueError:
        raise BadAnswer("expected JSON as answer") from None
