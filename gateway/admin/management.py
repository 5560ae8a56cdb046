"""Management calls in the manner of TensorFlow Serving's users: a model by its folder, in one call.

They are other words for the same resources (`gateway.admin.models`), without revisions.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.admin.operations import Answer, Call, Operation
from gateway.admin.schema import FolderBody, ReloadBody
from gateway.control import views
from gateway.control.repository import MODEL_FILE, parse_version
from gateway.control.views import ModelView, VersionView
from gateway.errors import Conflict, InvalidRequest, NotFound, Unavailable
from gateway.protocols import tfserving
from gateway.security.keys import Role

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

_MODELS = "/v1/models"
_MODEL = "/v1/models/{model}"

MAX_VERSIONS = 1000
"""Versions that one call registers."""

_STATES = {
    views.REGISTERED: "START",
    "LOADING": "LOADING",
    "WARMING": "LOADING",
    "READY": "AVAILABLE",
    views.DRAINING: "UNLOADING",
    views.RETIRED: "END",
    "FAILED": "END",
}


class ManagementHandlers:
    """The calls below ``/v1/models`` of the admin port.

    Args:
        plane: carries them out.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def operations(self) -> list[Operation]:
        """All of them."""
        deployer = Role.DEPLOYER
        status = dict[str, Any]
        return [
            Operation("GET", _MODELS, "Status of all models", self.models, status),
            Operation(
                "POST", _MODELS, "Register the versions of a folder and serve them", self.create,
                status, deployer, FolderBody, statuses=(201,), replays=True,
            ),
            Operation("GET", _MODEL, "Status of a model", self.model, status),
            Operation(
                "PUT", _MODEL, "Read a model again", self.reload, status, deployer, ReloadBody
            ),
            Operation("DELETE", _MODEL, "Unload a model", self.unload, status, deployer),
        ]  # fmt: skip

    async def models(self, call: Call) -> Answer:
        """Of each that the caller may see, by name."""
        found = [
            model for model in self._plane.registry.models() if call.identity.may_touch(model.name)
        ]
        return Answer({"models": [{"name": model.name, **_status(model)} for model in found]})

    async def create(self, call: Call) -> Answer:
        """One that is not there yet."""
        name = call.body.name
        call.identity.require_model(name)
        try:
            self._plane.registry.model(name)
        except NotFound:
            folder = await self._resolve(call, call.body.base_path)
            await self._plane.registry.take_settings(name, folder)
            await self._register(call, name)
            return Answer(_status(await self._plane.registry.load_model(name, call.actor)), 201)
        raise Conflict("there is a model of this name already: PUT reads it again")

    async def model(self, call: Call) -> Answer:
        """Of one."""
        return Answer(_status(self._plane.registry.model(call.model)))

    async def reload(self, call: Call) -> Answer:
        """What its repository, or first another folder, has now."""
        if call.body.base_path is not None:
            await self._register(call, call.model)
        return Answer(_status(await self._plane.registry.load_model(call.model, call.actor)))

    async def unload(self, call: Call) -> Answer:
        """All of its versions; nothing is removed."""
        self._plane.registry.model(call.model)  # NotFound
        await self._plane.registry.unload_model(call.model, call.actor)
        return Answer({})

    async def _register(self, call: Call, model: str) -> None:
        base_path = call.body.base_path
        folder = await self._resolve(call, base_path)
        numbers = await asyncio.to_thread(_versions_of, folder)
        for number in numbers:
            source = f"{base_path.rstrip('/')}/{number}/{MODEL_FILE}"
            # Checked anew: what lies in the folder may lead out of it.
            file = await self._resolve(call, source)
            await self._plane.registry.register(
                model, number, file, source, call.actor, False, None
            )

    async def _resolve(self, call: Call, path: str) -> Path:
        return await asyncio.to_thread(
            self._plane.registry.resolve_source, path, call.identity.may_touch
        )


def _versions_of(folder: Path) -> list[int]:
    """The versions in a folder, ascending. InvalidRequest: none, or too many."""
    try:
        found = [
            number
            for entry in folder.iterdir()
            if (number := parse_version(entry.name)) is not None and (entry / MODEL_FILE).is_file()
        ]
    except NotADirectoryError:
        found = []
    except OSError:
        raise Unavailable("the folder cannot be read") from None
    if not 0 < len(found) <= MAX_VERSIONS:
        raise InvalidRequest(
            f"base_path: expected a folder with 1 to {MAX_VERSIONS} versions: <version>/{MODEL_FILE}"
        )
    return sorted(found)


def _status(model: ModelView) -> dict[str, Any]:
    return tfserving.model_status(_version_status(version) for version in model.versions)


def _version_status(version: VersionView) -> tfserving.VersionStatus:
    is_failed = version.state == "FAILED"
    return tfserving.VersionStatus(
        str(version.number),
        _STATES.get(version.state, "START"),
        "UNKNOWN" if is_failed else "OK",
        version.reason,
    )
