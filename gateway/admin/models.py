"""Models, their versions, labels and routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.admin.operations import PREFIX, Answer, Call, Match, Operation
from gateway.admin.schema import (
    LabelBody,
    LabelPage,
    LabelView,
    ModelPage,
    PageQuery,
    RouteBody,
    RouteView,
    SourceBody,
    VersionPage,
)
from gateway.admin.upload import Uploads
from gateway.control.repository import parse_version
from gateway.control.views import ModelView, VersionView
from gateway.errors import InvalidRequest, NotFound
from gateway.security.keys import Role
from gateway.serving.routing import ModelRoute, Pin, Share, Sticky

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

_MODEL = f"{PREFIX}/models/{{model}}"
_VERSION = f"{_MODEL}/versions/{{version}}"
_LABEL = f"{_MODEL}/labels/{{label}}"
_ROUTE = f"{_MODEL}/route"

_Entry = TypeVar("_Entry")


class ModelHandlers:
    """The operations on models and what is beneath them.

    Args:
        plane: carries them out.
        uploads: takes files.
    """

    def __init__(self, plane: ControlPlane, uploads: Uploads) -> None:
        self._plane = plane
        self._uploads = uploads

    def operations(self) -> list[Operation]:
        """All of them."""
        always, deployer, admin = Match.ALWAYS, Role.DEPLOYER, Role.ADMIN
        return [
            Operation(
                "GET", f"{PREFIX}/models", "Models by name", self.models, ModelPage,
                query=PageQuery,
            ),
            Operation("GET", _MODEL, "One model", self.model, ModelView),
            Operation(
                "DELETE", _MODEL, "Unload a model and remove all of its versions",
                self.delete_model, None, admin, match=always, statuses=(204,),
            ),
            Operation(
                "POST", f"{_MODEL}:load", "Read a model from the repository and serve it",
                self.load_model, ModelView, deployer, match=Match.IF_THERE, replays=True,
            ),
            Operation(
                "POST", f"{_MODEL}:unload", "Unload all versions of a model", self.unload_model,
                ModelView, deployer, match=always, replays=True,
            ),
            Operation(
                "GET", f"{_MODEL}/versions", "A model's versions", self.versions, VersionPage,
                query=PageQuery,
            ),
            Operation("GET", _VERSION, "One version", self.version, VersionView),
            Operation(
                "PUT", _VERSION, "Register a version, by the path of its file or by the file itself",
                self.register, VersionView, deployer, SourceBody, match=Match.IF_GIVEN,
                statuses=(201, 200), is_upload=True,
            ),
            Operation(
                "DELETE", _VERSION, "Remove a version that is not loaded", self.delete_version, None,
                admin, match=always, statuses=(204,),
            ),
            Operation(
                "POST", f"{_VERSION}:load", "Load a version", self.load, VersionView, deployer,
                match=always, replays=True,
            ),
            Operation(
                "POST", f"{_VERSION}:unload", "Unload a version that nothing leads to", self.unload,
                VersionView, deployer, match=always, replays=True,
            ),
            Operation(
                "GET", f"{_MODEL}/labels", "A model's labels", self.labels, LabelPage,
                query=PageQuery,
            ),
            Operation(
                "PUT", _LABEL, "Set a label onto a version that is READY", self.set_label, ModelView,
                deployer, LabelBody, match=always,
            ),
            Operation(
                "DELETE", _LABEL, "Remove a label", self.delete_label, ModelView, deployer,
                match=always,
            ),
            Operation("GET", _ROUTE, "A model's route", self.route, RouteView),
            Operation(
                "PUT", _ROUTE, "Set a route by hand", self.set_route, ModelView, deployer, RouteBody,
                match=always,
            ),
            Operation(
                "DELETE", _ROUTE, "Let a model's settings decide its route again", self.reset_route,
                ModelView, deployer, match=always,
            ),
        ]  # fmt: skip

    # Models

    async def models(self, call: Call) -> Answer:
        """A page of those that the caller may see."""
        after = call.query.after or ""
        found = [
            model for model in self._plane.registry.models() if call.identity.may_touch(model.name)
        ]
        page, token = page_of([m for m in found if m.name > after], call.query.limit, _name_of)
        return Answer({"models": page, "next": token})

    async def model(self, call: Call) -> Answer:
        """One."""
        return self._shown(call.model)

    async def delete_model(self, call: Call) -> Answer:
        """Unload and remove it."""
        await self._plane.registry.delete_model(call.model, call.actor, call.revision)
        return Answer(None, 204)

    async def load_model(self, call: Call) -> Answer:
        """As its version policy decides."""
        view = await self._plane.registry.load_model(call.model, call.actor)
        return Answer(view, revision=view.revision)

    async def unload_model(self, call: Call) -> Answer:
        """All of it."""
        await self._plane.registry.unload_model(call.model, call.actor)
        return self._shown(call.model)

    def _shown(self, model: str) -> Answer:
        view = self._plane.registry.model(model)
        return Answer(view, revision=view.revision)

    # Versions

    async def versions(self, call: Call) -> Answer:
        """A page of them, ascending."""
        view = self._plane.registry.model(call.model)
        after = 0 if call.query.after is None else parse_version(call.query.after)
        if after is None:
            raise InvalidRequest("after: must be the number of a version")
        found = sorted((v for v in view.versions if v.number > after), key=_number_of)
        page, token = page_of(found, call.query.limit, _number_of)
        return Answer({"versions": page, "next": token}, revision=view.revision)

    async def version(self, call: Call) -> Answer:
        """One."""
        view = self._plane.registry.model(call.model)
        for version in view.versions:
            if version.number == call.version:
                return Answer(version, revision=view.revision)
        raise NotFound("the model has no such version")

    async def register(self, call: Call) -> Answer:
        """A new version, or the same again."""
        plane, model, number, by = self._plane, call.model, call.version, call.actor
        if call.body is None:
            async with self._uploads.receive(call.http, plane.registry.upload_folder()) as file:
                view, is_new = await plane.registry.register(
                    model, number, file, "upload", by, True
                )
        else:
            source = call.body.source
            file = await asyncio.to_thread(
                plane.registry.resolve_source, source, call.identity.may_touch
            )
            view, is_new = await plane.registry.register(model, number, file, source, by, False)
        return self._changed(call, view, 201 if is_new else 200)

    async def delete_version(self, call: Call) -> Answer:
        """Remove it and its files."""
        await self._plane.registry.delete_version(
            call.model, call.version, call.actor, call.revision
        )
        return Answer(None, 204)

    async def load(self, call: Call) -> Answer:
        """Answered when it is READY."""
        view = await self._plane.registry.load(call.model, call.version, call.actor, call.revision)
        return self._changed(call, view)

    async def unload(self, call: Call) -> Answer:
        """Answered when its requests have ended."""
        view = await self._plane.registry.unload(
            call.model, call.version, call.actor, call.revision
        )
        return self._changed(call, view)

    def _changed(self, call: Call, view: VersionView, status: int = 200) -> Answer:
        return Answer(view, status, self._plane.registry.model(call.model).revision)

    # Labels and routes

    async def labels(self, call: Call) -> Answer:
        """A page of them, by name."""
        view = self._plane.registry.model(call.model)
        after = call.query.after or ""
        found = [LabelView(*item) for item in sorted(view.labels.items()) if item[0] > after]
        page, token = page_of(found, call.query.limit, _label_of)
        return Answer({"labels": page, "next": token}, revision=view.revision)

    async def set_label(self, call: Call) -> Answer:
        """Onto another version, or for the first time."""
        view = await self._plane.registry.set_label(
            call.model, call.name("label"), call.body.version, call.actor, call.revision
        )
        return Answer(view, revision=view.revision)

    async def delete_label(self, call: Call) -> Answer:
        """Remove it."""
        view = await self._plane.registry.delete_label(
            call.model, call.name("label"), call.actor, call.revision
        )
        return Answer(view, revision=view.revision)

    async def route(self, call: Call) -> Answer:
        """As it would be put."""
        view = self._plane.registry.model(call.model)
        return Answer(route_view(view), revision=view.revision)

    async def set_route(self, call: Call) -> Answer:
        """Set it by hand."""
        current = self._plane.registry.model(call.model).route
        route = route_of(call.body, "" if current is None else current["salt"])
        view = await self._plane.registry.set_route(call.model, route, call.actor, call.revision)
        return Answer(view, revision=view.revision)

    async def reset_route(self, call: Call) -> Answer:
        """Forget what was set by hand."""
        view = await self._plane.registry.set_route(call.model, None, call.actor, call.revision)
        return Answer(view, revision=view.revision)


def route_of(body: RouteBody, salt: str) -> ModelRoute:
    """The route that a body asks for.

    Args:
        body: checked.
        salt: of the route that there is: who has a key stays where they are.
    """
    sticky = body.sticky
    return ModelRoute(
        shares=tuple(Share(share.version, share.weight_bp) for share in body.shares),
        salt=salt if sticky is None or sticky.salt is None else sticky.salt,
        sticky=None if sticky is None else Sticky(sticky.kind, sticky.name),
        pins=tuple(Pin(pin.header.lower(), pin.value, pin.version) for pin in body.match),
    )


def route_view(view: ModelView) -> RouteView:
    """A model's route in the form in which it is put."""
    route = view.route
    if route is None:
        return RouteView(view.route_by, [], None, [], None)
    sticky = route["sticky"]
    return RouteView(
        by=view.route_by,
        shares=[
            {"version": share["version"], "weight_bp": share["weight_bp"]}
            for share in route["shares"]
        ],
        sticky=None if sticky is None else {"key": _sticky_key(sticky), "salt": route["salt"]},
        match=[dict(pin) for pin in route["pins"]],
        shadow=route["shadow"],
    )


def page_of(
    entries: Sequence[_Entry], limit: int, token: Callable[[_Entry], Any]
) -> tuple[Sequence[_Entry], Any]:
    """The first entries, and the token of the last one where there are more."""
    page = entries[:limit]
    return page, token(page[-1]) if len(entries) > limit else None


def _sticky_key(sticky: dict[str, str]) -> str:
    return f"{sticky['kind']}:{sticky['name']}" if sticky["name"] else sticky["kind"]


def _name_of(model: ModelView) -> str:
    return model.name


def _number_of(version: VersionView) -> int:
    return version.number


def _label_of(label: LabelView) -> str:
    return label.label
