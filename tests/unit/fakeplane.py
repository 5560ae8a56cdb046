"""A control plane without processes: models and rollouts in memory, and a record of what was asked."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from gateway.admin.server import AdminServer
from gateway.control.views import ModelView, VersionSample, VersionView, WorkerView
from gateway.errors import Conflict, Forbidden, InvalidRequest, NotFound, PreconditionFailed
from gateway.rollout.record import ENDS, Rollout, RolloutState
from gateway.security.keys import key_digest, key_id, make_key
from gateway.serving.routing import ModelRoute
from gateway.settings import load_server_settings
from gateway.store.changes import AddAudit
from gateway.store.records import AuditRecord, EventRecord, KeyRecord, ReplayRecord

SECRET = b"s" * 32


class FakeStore:
    """What the admin port asks of the store, in memory."""

    def __init__(self) -> None:
        self.audit: list[AuditRecord] = []
        self.replays: dict[tuple[str, str], ReplayRecord] = {}

    async def call(self, method, *args):
        return getattr(self, method.__name__)(*args)

    def write(self, *changes: AddAudit) -> tuple[int, ...]:
        self.audit += [change.record for change in changes]
        return ()

    def remember(self, actor: str, key: str, request: str) -> ReplayRecord | None:
        first = self.replays.get((actor, key))
        if first is None:
            self.replays[actor, key] = ReplayRecord(actor, key, request, 0, {}, time.time())
            return None
        if first.request != request or not first.status:
            raise Conflict("this Idempotency-Key came with another request")
        return first

    def answered(self, actor: str, key: str, status: int, body) -> None:
        self.replays[actor, key] = replace(self.replays[actor, key], status=status, body=body)

    def forget(self, actor: str, key: str) -> None:
        del self.replays[actor, key]


def version_view(number: int, state: str = "READY", content: bytes = b"model") -> VersionView:
    return VersionView(
        number=number,
        state=state,
        reason="it does not load" if state == "FAILED" else "",
        since_s=1.0,
        digest=hashlib.sha256(content).hexdigest(),
        nbytes=len(content),
        source="repository",
        registered_s=1.0,
        is_wanted=None,
        memory_bytes=0,
        traffic_bp=0,
        labels=(),
        signature=None,
        workers=(WorkerView(0, "cpu", 1, True, 0),),
    )


class FakePlane:
    """A stand-in for `gateway.control.plane.ControlPlane`.

    ``calls`` holds the name and the arguments of every change that was carried out.
    """

    def __init__(self, folder: Path, models: int = 1) -> None:
        self.store = FakeStore()
        self.session_secret = SECRET
        self.registry = self  # one fake for both
        self.calls: list[tuple] = []
        self.event_records: list[EventRecord] = []
        self.sample_list: list[VersionSample] = []
        self.running: dict[str, Rollout] = {}
        self.files: dict[tuple[str, int], bytes] = {}
        self.settings_of: dict[str, Path] = {}
        self._folder = folder
        self._keys: dict[str, KeyRecord] = {}
        self._news = asyncio.Event()
        self._models: dict[str, ModelView] = {}
        for number in range(models):
            self.add_model(f"m{number}")

    # What tests set up

    def add_model(self, name: str, *versions: VersionView) -> None:
        found = versions or (version_view(1), version_view(2))
        route = ModelRoute.to(found[0].number).to_wire()
        self._models[name] = ModelView(name, 3, route, "policy", {}, found, None)

    def add_key(self, role: str, *models: str, expires_s: float | None = None) -> str:
        """The text of a new key."""
        identity, text = make_key()
        digest = key_digest(SECRET, text)
        self._keys[identity] = KeyRecord(identity, role, role, models, digest, 1.0, expires_s)
        return text

    def add_event(self, model: str = "m0", rollout: str = "", kind: str = "version.ready") -> None:
        number = len(self.event_records) + 1
        event = EventRecord(float(number), kind, model, "gateway", "it is", rollout, {}, number)
        self.event_records.append(event)
        self._news.set()

    def _did(self, *call, revision: int | None = None) -> None:
        model = self.model(call[1])
        if revision is not None and revision != model.revision:
            raise PreconditionFailed("stale")
        self.calls.append(call)
        self._models[model.name] = replace(model, revision=model.revision + 1)

    # What the admin port asks

    def models(self) -> list[ModelView]:
        return [self._models[name] for name in sorted(self._models)]

    def model(self, name: str) -> ModelView:
        if name not in self._models:
            raise NotFound("unknown model")
        return self._models[name]

    def samples(self) -> list[VersionSample]:
        return self.sample_list

    def render_metrics(self) -> bytes:
        return b"# nothing\n"

    def resolve_source(self, path: str, may_see) -> Path:
        first = Path(path).parts[0]
        if ".." in path or (first in self._models and not may_see(first)):
            raise Forbidden("the path is beneath no model root")
        if not (self._folder / path).exists():
            raise InvalidRequest("there is no such file")
        return self._folder / path

    def upload_folder(self) -> Path:
        return self._folder

    async def take_settings(self, model, folder):
        self.settings_of[model] = folder

    async def register(self, model, version, file, source, by, is_move, is_wanted=False):
        content = file.read_bytes()
        before = self.files.setdefault((model, version), content)
        if before != content:
            raise Conflict("the version has other content")
        if is_move:
            file.unlink()
        is_new = ("register", model, version) not in [call[:3] for call in self.calls]
        if model not in self._models:
            self.add_model(model, version_view(version, "REGISTERED", content))
        self._did("register", model, version, source, by)
        return version_view(version, "REGISTERED", content), is_new

    async def load(self, model, version, by, revision):
        self._did("load", model, version, by, revision=revision)
        return version_view(version)

    async def unload(self, model, version, by, revision):
        self._did("unload", model, version, by, revision=revision)
        return version_view(version, "RETIRED")

    async def delete_version(self, model, version, by, revision):
        self._did("delete_version", model, version, by, revision=revision)

    async def delete_model(self, model, by, revision):
        self._did("delete_model", model, by, revision=revision)
        del self._models[model]

    async def set_label(self, model, label, version, by, revision):
        self._did("set_label", model, label, version, by, revision=revision)
        labels = {**self.model(model).labels, label: version}
        self._models[model] = replace(self.model(model), labels=labels)
        return self.model(model)

    async def delete_label(self, model, label, by, revision):
        self._did("delete_label", model, label, by, revision=revision)
        return self.model(model)

    async def set_route(self, model, route, by, revision):
        self._did("set_route", model, route, by, revision=revision)
        wire = ModelRoute.to(1).to_wire() if route is None else route.to_wire()
        self._models[model] = replace(self.model(model), route=wire, route_by="hand")
        return self.model(model)

    async def load_model(self, model, by):
        if model not in self._models:
            self.add_model(model)
        self._did("load_model", model, by)
        return self.model(model)

    async def unload_model(self, model, by):
        self._did("unload_model", model, by)

    async def start_rollout(self, model, spec, by):
        if self.model(model).rollout is not None:
            raise Conflict("one is active")
        made = Rollout(f"r{len(self.running)}", model, replace_stable(spec), "salt", 1.0, 1.0)
        self.running[made.id] = made
        self._did("start_rollout", model, by)
        self._models[model] = replace(self.model(model), rollout=made.id)
        return made

    async def plan(self, model, spec):
        return {"would": "do", "canary": spec.canary}

    async def rollouts(self, models, before, limit):
        newest = [r for r in reversed(self.running.values()) if models is None or r.model in models]
        if before is not None:
            at = [each.id for each in newest].index(before)
            newest = newest[at + 1 :]
        return newest[:limit]

    async def rollout(self, model, id_):
        found = self.running.get(id_)
        if found is None or found.model != model:
            raise NotFound("unknown rollout")
        return found

    async def command(self, model, id_, verb, by, revision):
        found = await self.rollout(model, id_)
        if found.state in ENDS:
            raise Conflict("it has ended")
        self._did(verb, model, id_, by, revision=revision)
        if verb == "abort":
            self.running[id_] = replace(found, state=RolloutState.ABORTED)
            self._models[model] = replace(self.model(model), rollout=None)
        return self.running[id_]

    async def events(self, after, model, rollout, limit):
        return [
            event
            for event in self.event_records
            if event.id > after
            and model in (None, event.model)
            and rollout in (None, event.rollout)
        ][:limit]

    async def newest_events(self, model, rollout, limit):
        return (await self.events(0, model, rollout, None))[-limit:]

    async def wait_events(self, after):
        while not any(event.id > after for event in self.event_records):
            self._news.clear()
            await self._news.wait()

    async def audit(self, after, limit):
        return [AuditRecord(1.0, "a", "put", "m0", None, {"x": 1}, n) for n in (1, 2) if n > after]

    def has_keys(self) -> bool:
        return any(self._is_valid(key) for key in self._keys.values())

    def key_of(self, text: str) -> KeyRecord | None:
        found = self.key_by_id(key_id(text) or "")
        return found if found and found.digest == key_digest(SECRET, text) else None

    def key_by_id(self, id_: str) -> KeyRecord | None:
        found = self._keys.get(id_)
        return found if found is not None and self._is_valid(found) else None

    def keys(self) -> list[KeyRecord]:
        return list(self._keys.values())

    async def create_key(self, name, role, models, expires_s, by):
        text = self.add_key(role, *models, expires_s=expires_s)
        found = self._keys[key_id(text)]
        self._keys[found.id] = found = replace(found, name=name)
        self.calls.append(("create_key", name, role, by))
        return found, text

    async def revoke_key(self, id_, by):
        self.calls.append(("revoke_key", id_, by))
        self._keys[id_] = replace(self._keys[id_], revoked_s=2.0)
        return self._keys[id_]

    def _is_valid(self, key: KeyRecord) -> bool:
        is_over = key.expires_s is not None and key.expires_s <= time.time()
        return key.revoked_s is None and not is_over


def replace_stable(spec):
    """The spec with the version that it is to replace."""
    return spec.model_copy(update={"stable": spec.stable or 1})


class AdminPort:
    """An admin port of a fake plane, and a client that asks it. An asynchronous context.

    Args:
        plane: the fake.
        settings: of the server, beside the defaults.
    """

    def __init__(self, plane: FakePlane, **settings) -> None:
        self.plane = plane
        settings = {"model_repository": Path("/nonexistent"), **settings}
        self.server = AdminServer(plane, load_server_settings(**settings))
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> AdminPort:
        await self.server.start(self.sock)
        self.session = aiohttp.ClientSession(self.url, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()
        await self.server.stop()

    async def ask(self, method: str, path: str, key: str | None = None, **more) -> Reply:
        """Send a request; ``match`` is its If-Match, ``json`` its body."""
        headers = dict(more.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if (match := more.pop("match", None)) is not None:
            headers["If-Match"] = match
        async with self.session.request(method, path, headers=headers, **more) as answer:
            raw = await answer.read()
            is_json = answer.content_type == "application/json"
            return Reply(answer.status, answer.headers, json.loads(raw) if is_json else raw)


@dataclass(frozen=True)
class Reply:
    """An answer, read."""

    status: int
    headers: Mapping[str, str]
    body: Any
