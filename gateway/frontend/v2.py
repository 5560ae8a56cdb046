"""Handlers of the Open Inference Protocol v2 (Triton, KServe), and of msgpack on the same routes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web

from gateway.errors import Forbidden, InvalidRequest
from gateway.frontend.answers import VERSION, json_answer
from gateway.frontend.bodies import read_body
from gateway.frontend.caller import HttpCaller
from gateway.frontend.exchanges import HEADER_LENGTH, v2_exchange
from gateway.frontend.inference import Inference
from gateway.frontend.operations import Operations
from gateway.protocols import jsontext, v2_documents
from gateway.serving.routes import RouteTable, Version, VersionState, checked_name
from gateway.telemetry.metrics import Duration


class V2Handlers:
    """The routes below ``/v2``.

    Args:
        routes: models and versions.
        inference: runs the inferences.
        operations: load and unload models; None where clients may not.
        max_request_bytes: bounds the bodies of other requests, too.
    """

    def __init__(
        self,
        routes: RouteTable,
        inference: Inference,
        operations: Operations | None,
        max_request_bytes: int,
    ) -> None:
        self._routes = routes
        self._inference = inference
        self._operations = operations
        self._max_request_bytes = max_request_bytes

    def add_to(self, app: web.Application) -> None:
        """Register every route."""
        get, post = app.router.add_get, app.router.add_post
        get("/v2", self.server_metadata)
        get("/v2/models/stats", self.all_statistics)
        post("/v2/repository/index", self.repository_index)
        post("/v2/repository/models/{model:[^/]*}/load", self.load_model)
        post("/v2/repository/models/{model:[^/]*}/unload", self.unload_model)
        model = "/v2/models/{model:[^/]*}"  # an empty name is a bad name, not an unknown path
        for prefix in (model, model + "/versions/{version}"):
            get(prefix, self.model_metadata)
            get(f"{prefix}/ready", self.model_ready)
            get(f"{prefix}/config", self.model_config)
            get(f"{prefix}/stats", self.model_statistics)
            post(f"{prefix}/infer", self.infer)

    def _resolve(self, http: web.Request) -> Version:
        info = http.match_info
        return self._routes.resolve(info["model"], info.get("version"))

    async def server_metadata(self, _http: web.Request) -> web.Response:
        """Name, version, extensions."""
        return json_answer(v2_documents.server_metadata())

    async def model_metadata(self, http: web.Request) -> web.Response:
        """Names, datatypes and shapes of inputs and outputs."""
        version = self._resolve(http)
        signature = version.ready()
        numbers = sorted(v.number for v in self._routes.model(version.model).values() if v.is_ready)
        http[VERSION] = version
        return json_answer(
            v2_documents.model_metadata(version.model, [str(n) for n in numbers], signature)
        )

    async def model_ready(self, http: web.Request) -> web.Response:
        """200 when the version answers, 503 otherwise."""
        version = self._resolve(http)
        version.ready()
        http[VERSION] = version
        if version.is_ready:
            return web.Response()
        return json_answer({"error": "no worker of this version is alive right now"}, 503)

    async def model_config(self, http: web.Request) -> web.Response:
        """The model's configuration in Triton's form."""
        version = self._resolve(http)
        signature = version.ready()
        http[VERSION] = version
        return json_answer(v2_documents.model_config(version.model, signature, **version.config))

    async def model_statistics(self, http: web.Request) -> web.Response:
        """Counters of one version, or of all versions of a model."""
        info = http.match_info
        if "version" in info:
            versions: Iterable[Version] = [self._resolve(http)]
        else:
            versions = self._routes.model(info["model"]).values()
        return json_answer(v2_documents.model_stats([_statistics(v) for v in versions]))

    async def all_statistics(self, _http: web.Request) -> web.Response:
        """Counters of every version of every model."""
        every = [_statistics(v) for v in self._routes.versions()]
        return json_answer(v2_documents.model_stats(every))

    async def repository_index(self, http: web.Request) -> web.Response:
        """Every version with its state; with ``{"ready": true}`` only those that are READY."""
        body = await read_body(http, self._max_request_bytes)
        options = jsontext.loads(body) if body else {}
        if not isinstance(options, dict) or not isinstance(options.get("ready", False), bool):
            raise InvalidRequest('the body must be empty or {"ready": true|false}')
        ready_only = options.get("ready", False)
        entries = [
            v2_documents.IndexEntry(v.model, str(v.number), *_triton_state(v))
            for v in self._routes.versions()
            if v.is_ready or not ready_only
        ]
        return json_answer(v2_documents.repository_index(entries))

    async def load_model(self, http: web.Request) -> web.Response:
        """Read a model from the repository anew and serve the versions that its policy chooses."""
        operations, name = self._controlled(http)
        if await self._operation_parameters(http):
            raise InvalidRequest(
                "a model is loaded as it lies in the repository: "
                "parameters (config, file:…) are not supported"
            )
        await operations.run("load", name)
        return web.Response()

    async def unload_model(self, http: web.Request) -> web.Response:
        """End every version of a model; one that is not there is unloaded already."""
        operations, name = self._controlled(http)
        parameters = await self._operation_parameters(http)
        dependents = parameters.pop("unload_dependents", False)  # models here have none
        if parameters or not isinstance(dependents, bool):
            raise InvalidRequest("the one parameter is unload_dependents, true or false")
        await operations.run("unload", name)
        return web.Response()

    def _controlled(self, http: web.Request) -> tuple[Operations, str]:
        """Who carries it out, and on which model. Forbidden where clients may not ask for it."""
        if self._operations is None:
            raise Forbidden(
                "models are not loaded or unloaded through the data port: model_control is off"
            )
        return self._operations, checked_name(http.match_info["model"])

    async def _operation_parameters(self, http: web.Request) -> dict[str, Any]:
        body = await read_body(http, self._max_request_bytes)
        document = jsontext.loads(body) if body else {}
        parameters = document.get("parameters", {}) if isinstance(document, dict) else None
        if not isinstance(parameters, dict):
            raise InvalidRequest('the body must be empty or {"parameters": {…}}')
        return parameters

    async def infer(self, http: web.Request) -> web.Response:
        """One inference: JSON, JSON with binary tensors, one raw tensor, or msgpack."""
        info = http.match_info
        choice = self._routes.choose(info["model"], info.get("version"), None, HttpCaller(http))
        header_length = http.headers.get(HEADER_LENGTH)
        exchange = v2_exchange(choice.version, http.content_type, header_length)
        return await self._inference.run(http, choice, exchange)


def _triton_state(version: Version) -> tuple[str, str]:
    """State and reason of a version in Triton's words."""
    match version.state:
        case VersionState.LOADING | VersionState.WARMING:
            return "LOADING", version.reason
        case VersionState.FAILED:
            return "UNAVAILABLE", version.reason
        case VersionState.UNLOADED:
            return "UNAVAILABLE", "unloaded"
        case _:
            return version.state.value, version.reason


def _statistics(version: Version) -> v2_documents.ModelStatistics:
    s = version.metrics.statistics

    def spent(duration: Duration) -> v2_documents.Spent:
        return v2_documents.Spent(duration.count, duration.ns)

    return v2_documents.ModelStatistics(
        name=version.model,
        version=str(version.number),
        last_inference_ms=s.last_inference_ms,
        inference_count=s.inference_count,
        execution_count=s.execution_count,
        success=spent(s.success),
        fail=spent(s.fail),
        queue=spent(s.queue),
        compute_infer=spent(s.compute_infer),
        batches=[
            v2_documents.BatchStatistics(
                rows, v2_documents.Spent(), spent(duration), v2_documents.Spent()
            )
            for rows, duration in sorted(s.batches.items())
        ],
    )
