"""What a route may ask of a request that aiohttp has read; the fast lane's connections answer the same."""

from __future__ import annotations

from aiohttp import web


class HttpCaller:
    """A `serving.routing.Caller` over a request of aiohttp."""

    __slots__ = ("_http",)

    def __init__(self, http: web.Request) -> None:
        self._http = http

    def header(self, name: str) -> str | None:
        """The first value of a header; None where it has none."""
        return self._http.headers.get(name)

    def address(self) -> str:
        """Of the client, as the transport has it; empty where it has none."""
        return self._http.remote or ""
