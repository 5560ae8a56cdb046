"""Handlers of TensorFlow Serving's REST API."""

from __future__ import annotations

from aiohttp import web

from gateway.errors import NotSupported
from gateway.frontend.answers import VERSION, json_answer
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

    async def status(self, http: web.Request) -> web.Response:
        """State of one version, or of all versions of a model."""
        info = http.match_info
        if "version" in info or "label" in info:
            versions = [self._resolve(http)]
        else:
            found = self._routes.model(info["model"])
            versions = sorted(found.values(), key=lambda v: v.number, reverse=True)
        return json_answer(
            tfserving.model_status(
                tfserving.VersionStatus(
                    str(v.number),
                    _STATES[v.state],
                    "UNKNOWN" if v.state is VersionState.FAILED else "OK",
                    v.reason,
                )
                for v in versions
            )
        )

    async def metadata(self, http: web.Request) -> web.Response:
        """The signature in TensorFlow's form."""
        version = self._resolve(http)
        signature = version.ready()
        http[VERSION] = version
        return json_answer(tfserving.metadata(version.model, str(version.number), signature))

    async def predict(self, http: web.Request) -> web.Response:
        """One inference, in rows or in columns."""
        return await self._inference.run(http, self._resolve(http), PREDICT)

    async def no_such_signature(self, http: web.Request) -> web.Response:
        """``:classify`` and ``:regress`` need a signature that ONNX models do not have."""
        http[VERSION] = self._resolve(http)
        raise NotSupported("ONNX models have no classify or regress signature; use :predict")
