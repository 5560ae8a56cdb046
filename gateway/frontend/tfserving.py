"""Handlers of TensorFlow Serving's REST API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web

from gateway.errors import NotSupported
from gateway.frontend.answers import VERSION, json_answer
from gateway.frontend.caller import HttpCaller
from gateway.frontend.exchanges import PREDICT
from gateway.frontend.inference import Inference
from gateway.protocols import tfserving
from gateway.serving.routes import RouteTable, Version, VersionState

_STATES = {
    VersionState.LOADING: "LOADING",
    VersionState.WARMING: "LOADING",
    VersionState.READY: "AVAILABLE",
    VersionState.FAILED: "END",
    VersionState.UNLOADING: "UNLOADING",
    VersionState.UNLOADED: "END",
}


class TensorFlowHandlers:
    """The routes below ``/v1/models``.

    Args:
        routes: models and versions.
        inference: runs the inferences.
    """

    def __init__(self, routes: RouteTable, inference: Inference) -> None:
        self._routes = routes
        self._inference = inference

    def add_to(self, app: web.Application) -> None:
        """Register every route."""
        get, post = app.router.add_get, app.router.add_post
        get("/v1/models", self.models)
        model = "/v1/models/{model:[^/:]*}"  # an empty name is a bad name, not an unknown path
        for prefix in (
            model,
            model + "/versions/{version:[^/:]+}",
            model + "/labels/{label:[^/:]+}",
            model + "/versions/{version:[^/:]+}/labels/{label:[^/:]+}",  # refused in words
        ):
            get(prefix, self.status)
            get(f"{prefix}/metadata", self.metadata)
            post(f"{prefix}:predict", self.predict)
            post(f"{prefix}:classify", self.no_such_signature)
            post(f"{prefix}:regress", self.no_such_signature)

    def _resolve(self, http: web.Request) -> Version:
        info = http.match_info
        return self._routes.resolve(info["model"], info.get("version"), info.get("label"))

    async def models(self, _http: web.Request) -> web.Response:
        """Every model with the states of its versions."""
        found = sorted(self._routes.models.items())
        return json_answer(
            {"models": [{"name": name, **_status(vs.values())} for name, vs in found]}
        )

    async def status(self, http: web.Request) -> web.Response:
        """State of one version, or of all versions of a model."""
        info = http.match_info
        if "version" in info or "label" in info:
            return json_answer(_status([self._resolve(http)]))
        return json_answer(_status(self._routes.model(info["model"]).values()))

    async def metadata(self, http: web.Request) -> web.Response:
        """The signature in TensorFlow's form."""
        version = self._resolve(http)
        signature = version.ready()
        http[VERSION] = version
        return json_answer(tfserving.metadata(version.model, str(version.number), signature))

    async def predict(self, http: web.Request) -> web.Response:
        """One inference, in rows or in columns."""
        info = http.match_info
        choice = self._routes.choose(
            info["model"], info.get("version"), info.get("label"), HttpCaller(http)
        )
        return await self._inference.run(http, choice, PREDICT)

    async def no_such_signature(self, http: web.Request) -> web.Response:
        """``:classify`` and ``:regress`` need a signature that ONNX models do not have."""
        http[VERSION] = self._resolve(http)
        raise NotSupported("ONNX models have no classify or regress signature; use :predict")


def _status(versions: Iterable[Version]) -> dict[str, Any]:
    """The states of versions, the newest first."""
    return tfserving.model_status(
        tfserving.VersionStatus(
            str(v.number),
            _STATES[v.state],
            "UNKNOWN" if v.state is VersionState.FAILED else "OK",
            v.reason,
        )
        for v in sorted(versions, key=lambda v: v.number, reverse=True)
    )
