"""The dashboard's files, read once: what is not in this list is not served."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from aiohttp import web

from gateway.admin.endpoint import check_expect
from gateway.admin.operations import PREFIX

_TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    content_type: str


class Pages:
    """``/``, ``/static/{name}`` and the page to try the API."""

    def __init__(self) -> None:
        self._files = {
            entry.name: _File(entry.read_bytes(), kind)
            for entry in files("gateway.admin").joinpath("dashboard").iterdir()
            if (kind := _TYPES.get(entry.name.rpartition(".")[2])) is not None
        }

    def add_to(self, app: web.Application) -> None:
        """Register them."""
        for path in ("/", "/static/{name:[^/]*}", f"{PREFIX}/docs"):
            app.router.add_get(path, self.serve, expect_handler=check_expect)

    async def serve(self, http: web.Request) -> web.Response:
        """One file."""
        name = "index.html" if http.path == "/" else http.match_info.get("name", "docs.html")
        file = self._files.get(name)
        if file is None:
            raise web.HTTPNotFound
        return web.Response(
            body=file.body,
            content_type=file.content_type,
            charset="utf-8",
            headers={"Cache-Control": "no-cache"},
        )
