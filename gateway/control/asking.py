"""What a rollout asks others: Prometheus for a value, a webhook for its consent.

An answer belongs to the attempt and step that it was asked for; it is taken at a later look. Nothing here
keeps a look waiting, and whatever goes wrong is no answer. A gate's call is signed (HMAC-SHA256 over the
time, a full stop and the body) where the server has a secret, so that its receiver can tell who calls.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import orjson

from gateway.clock import steady_s, wall_s
from gateway.errors import InvalidRequest
from gateway.rollout.facts import asks
from gateway.rollout.record import Rollout
from gateway.rollout.spec import PLACEHOLDERS, GateSpec, MetricSpec, RolloutSpec
from gateway.settings import ServerSettings

log = logging.getLogger("gateway.control")

QUERY_TIMEOUT_S = 5.0
"""Time that Prometheus has to answer."""

MAX_ANSWER_BYTES = 64 << 10
"""Of an answer that is read."""

SIGNATURE, STAMP = "x-gateway-signature", "x-gateway-timestamp"


def check_asks(spec: RolloutSpec, settings: ServerSettings) -> None:
    """InvalidRequest for a query or gate that the server's settings do not allow."""
    if settings.prometheus_url is None and any(m.source == "prometheus" for m in spec.metrics):
        raise InvalidRequest("metrics: a prometheus metric needs the server's prometheus_url")
    for gate in spec.gates:
        try:
            host = urlsplit(gate.url).hostname
        except ValueError:
            host = None
        if host not in settings.webhook_hosts:
            raise InvalidRequest(
                f"gates: the host of gate '{gate.name}' is not in the server's webhook_hosts"
            )


@dataclass(slots=True)
class _Asked:
    """What was asked in one step of one attempt."""

    of: tuple[int, int]
    last_s: float = 0.0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    queries: dict[str, float | None] = field(default_factory=dict)
    gates: dict[str, bool | None] = field(default_factory=dict)


class Asking:
    """The questions of one rollout. Belongs to the event loop.

    Args:
        settings: the server's.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._asked = _Asked((0, 0))

    def ask(self, rollout: Rollout) -> None:
        """Ask what the next look wants, unless the last questions are unanswered or just asked."""
        of = rollout.attempt, rollout.step
        if self._asked.of != of:
            self.close()
            self._asked = _Asked(of)
        asked, now_s = self._asked, steady_s()
        if asked.tasks or now_s - asked.last_s < rollout.spec.interval_s:
            return
        queries, gates = asks(rollout, now_s)
        if queries or gates:
            asked.last_s = now_s
        for metric in queries:
            self._begin(asked, self._ask_query(asked, rollout, metric))
        for gate in gates:
            self._begin(asked, self._ask_gate(asked, rollout, gate))

    def take(self, rollout: Rollout) -> tuple[dict[str, float | None], dict[str, bool | None]]:
        """The answers that came for this step since they were last taken."""
        asked = self._asked
        if asked.of != (rollout.attempt, rollout.step):
            return {}, {}
        queries, gates = asked.queries, asked.gates
        asked.queries, asked.gates = {}, {}
        return queries, gates

    def close(self) -> None:
        """Nobody waits for answers any more."""
        for task in self._asked.tasks:
            task.cancel()

    def _begin(self, asked: _Asked, question: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(question)
        asked.tasks.add(task)
        task.add_done_callback(asked.tasks.discard)

    async def _ask_query(self, asked: _Asked, rollout: Rollout, metric: MetricSpec) -> None:
        value = await _answer(metric.name, partial(self._query, rollout, metric))
        asked.queries[metric.name] = value

    async def _ask_gate(self, asked: _Asked, rollout: Rollout, gate: GateSpec) -> None:
        approved = await _answer(gate.name, partial(self._call, rollout, gate))
        asked.gates[gate.name] = approved

    async def _query(self, rollout: Rollout, metric: MetricSpec) -> float | None:
        """The one value that a query gives; None for none, several or not a number."""
        values = {"model": rollout.model, "canary": rollout.canary, "stable": rollout.stable}
        text = PLACEHOLDERS.sub(lambda found: str(values[found[1]]), metric.query or "")
        url = f"{(self._settings.prometheus_url or '').rstrip('/')}/api/v1/query"
        document = await _exchange(
            QUERY_TIMEOUT_S, lambda http: http.get(url, params={"query": text})
        )
        data = document.get("data")
        result = data.get("result") if isinstance(data, dict) else None
        if not isinstance(result, list) or len(result) != 1:
            return None
        pair = result[0].get("value") if isinstance(result[0], dict) else None
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        value = float(pair[1])
        return value if math.isfinite(value) else None

    async def _call(self, rollout: Rollout, gate: GateSpec) -> bool | None:
        """Whether a gate agrees; None for an answer that is none."""
        body = orjson.dumps(
            {
                "gate": gate.name,
                "rollout": rollout.id,
                "model": rollout.model,
                "stable": rollout.stable,
                "canary": rollout.canary,
                "attempt": rollout.attempt,
                "step": rollout.step,
                "weight_bp": rollout.spec.steps[rollout.step].weight_bp,
                "verdicts": {name: dict(found) for name, found in rollout.verdicts.items()},
            }
        )
        headers = {"Content-Type": "application/json", **self._signature(body)}
        document = await _exchange(
            gate.timeout_s,
            lambda http: http.post(gate.url, data=body, headers=headers, allow_redirects=False),
        )
        approved = document.get("approved")
        return approved if isinstance(approved, bool) else None

    def _signature(self, body: bytes) -> dict[str, str]:
        secret = self._settings.webhook_secret
        if secret is None:
            return {}
        stamp = str(int(wall_s()))
        signed = hmac.new(
            secret.get_secret_value().encode(), stamp.encode() + b"." + body, hashlib.sha256
        )
        return {STAMP: stamp, SIGNATURE: f"sha256={signed.hexdigest()}"}


_T = TypeVar("_T")


async def _answer(name: str, ask: Callable[[], Awaitable[_T | None]]) -> _T | None:
    """What was answered; None where nothing was, whatever went wrong."""
    try:
        return await ask()
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        log.warning("'%s' gave no answer: %s", name, type(error).__name__)
        return None


_Request = Callable[[aiohttp.ClientSession], "aiohttp.client._RequestContextManager"]


async def _exchange(timeout_s: float, request: _Request) -> dict[str, Any]:
    """A JSON object that was answered with 200; an empty one for anything else that is no failure.

    Raises:
        TimeoutError, aiohttp.ClientError, OSError, ValueError: there was none.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=False) as http,
        request(http) as answer,
    ):
        if answer.status != 200:
            return {}
        body = await answer.content.read(MAX_ANSWER_BYTES)
        document = orjson.loads(body)
        return document if isinstance(document, dict) else {}
