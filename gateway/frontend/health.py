"""Handlers for load balancers and Prometheus."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.errors import Unavailable
from gateway.frontend.answers import DRAINING
from gateway.serving.routes import RouteTable
from gateway.telemetry.metrics import Metrics


class HealthHandlers:
    """Liveness, readiness and metrics.

    Args:
        routes: what readiness is about.
        metrics: what is scraped.
        strict_readiness: whether a model that failed makes the server unready.
    """

    def __init__(self, routes: RouteTable, metrics: Metrics, strict_readiness: bool) -> None:
        self._routes = routes
        self._metrics = metrics
        self._strict = strict_readiness

    def add_to(self, app: web.Application) -> None:
        """Register the routes of the data port."""
        for path in ("/livez", "/v2/health/live"):
            app.router.add_get(path, self.live)
        for path in ("/readyz", "/v2/health/ready"):
            app.router.add_get(path, self.ready)
        self.add_metrics_to(app)

    def add_metrics_to(self, app: web.Application) -> None:
        """Register ``/metrics`` alone."""
        app.router.add_get("/metrics", self.metrics)

    async def live(self, _http: web.Request) -> web.Response:
        """The event loop turns."""
        return web.Response()

    async def ready(self, http: web.Request) -> web.Response:
        """Requests are accepted and every route leads to a version that answers."""
        if http.app[DRAINING].is_set():
            raise Unavailable("the server is shutting down")
        if not self._routes.is_ready(self._strict):
            raise Unavailable("not every model is ready")
        return web.Response()

    async def metrics(self, _http: web.Request) -> web.Response:
        """All metrics, as of now."""
        dispatchers = [v.dispatcher for v in self._routes.versions() if v.dispatcher is not None]
        for dispatcher in dispatchers:
            dispatcher.metrics.queue_depth(dispatcher.waiting())
        body = self._metrics.render()
        for dispatcher in dispatchers:
            dispatcher.tell_depth()  # this moment's would go stale where others are scraped
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
