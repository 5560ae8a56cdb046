"""HTTP by aiohttp: kept-alive connections, one attempt, failures told apart by whether anything was sent."""

from __future__ import annotations

import io
from collections.abc import Mapping

import aiohttp

from gateway import __version__
from gateway.client.addresses import Address
from gateway.client.errors import BadAnswer, ConnectionFailed, ConnectionLost
from gateway.client.failover import Reply, Request

CONNECT_TIMEOUT_S = 3.0
"""How long to wait for a connection before another address is tried."""

_LARGE_BODY_BYTES = 1 << 20
"""From here on aiohttp wants a body that it can send in pieces."""


class HttpTransport:
    """Sends requests. Made inside of a running event loop, and closed there.

    Args:
        connections: most connections to one address at a time; more requests wait for one.
        headers: sent with every request.
    """

    def __init__(self, connections: int, headers: Mapping[str, str]) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=connections),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"inference-gateway-client/{__version__}", **headers},
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def send(self, address: Address, request: Request, timeout_s: float) -> Reply:
        """Send once; see `failover.Transport`. BadAnswer: what came back is not HTTP."""
        body: bytes | io.BytesIO | None = request.body
        if request.body is not None and len(request.body) > _LARGE_BODY_BYTES:
            body = io.BytesIO(request.body)
        try:
            async with self._session.request(
                request.method,
                address.url + request.path,
                data=body,
                headers=request.headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            ) as answer:
                return Reply(
                    answer.status, answer.headers, await answer.read(), answer.content_type
                )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectionFailed(f"cannot connect to {address.url}") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionLost(f"{address.url} closed the connection unanswered") from error
        except aiohttp.ClientError as error:
            raise BadAnswer(f"{address.url} did not answer in HTTP") from error
