"""A control plane that makes up its traffic, for the dashboard; real code judges and moves its rollouts.

``python -m tests.system.fakeadmin [PORT]`` serves it for work on the dashboard.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from gateway._kernels.ledger import ROW_BOUNDS, sketch_bucket
from gateway.admin.server import AdminServer
from gateway.control.views import ModelView, VersionSample, VersionView, WorkerView
from gateway.errors import Conflict, PreconditionFailed
from gateway.rollout.analysis import judge
from gateway.rollout.facts import Facts
from gateway.rollout.machine import RolloutMachine
from gateway.rollout.observation import Arm, Observation
from gateway.rollout.record import Rollout, RolloutState, route_of
from gateway.rollout.spec import RolloutSpec
from gateway.serving.routes import VersionState
from gateway.serving.routing import ModelRoute
from gateway.settings import load_server_settings
from gateway.store.records import EventRecord
from gateway.telemetry.ledger import SKETCH_BOUNDS_NS
from tests.unit.fakeplane import FakePlane, version_view

SIGNATURE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [None, 784], "optional": False}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [None, 10], "optional": False}],
    "max_batch_size": 64,
    "allowed_batch_sizes": [],
    "padding": [],
    "describes_outputs": False,
}
RATES = {"digits": 640.0, "resnet50": 42.0}
ROWS = 8
TICK_S = 0.25


def version(number: int, state: str = "READY", **changes) -> VersionView:
    is_loaded = state == "READY"
    workers = (WorkerView(0, "cpu", 4100 + number, True, 0), WorkerView(1, "cpu", None, False, 2))
    view = replace(
        version_view(number, state, b"%d" % number),
        since_s=time.time() - 5400 * number,
        registered_s=time.time() - 86_400,
        nbytes=1_843_200,
        memory_bytes=134_000_000 if is_loaded else 0,
        signature=SIGNATURE if is_loaded else None,
        workers=workers[: 2 if number == 3 else 1] if is_loaded else (),
    )
    return replace(view, **changes)


class LivePlane(FakePlane):
    """Two models under load, one that is loading. `tick` lets time pass.

    ``errors`` and ``slower`` are what the canary does worse than the stable version: a part of its requests
    that fail, and a factor of its time.
    """

    def __init__(self, folder) -> None:
        super().__init__(folder, models=0)
        self.add_model(
            "digits",
            version(2, "FAILED", reason="the graph has an operator that is not known: Frobnicate"),
            version(3, labels=("stable",)),
            version(4),
            version(5, "REGISTERED"),
        )
        self._models["digits"] = replace(
            self._models["digits"], route=ModelRoute.to(3).to_wire(), labels={"stable": 3}
        )
        self.add_model("bert-base", version(1, "LOADING"))
        self._models["bert-base"] = replace(self._models["bert-base"], route=None)
        self.add_model("resnet50", version(1, labels=("stable", "canary")))
        self.errors, self.slower = 0.001, 1.0
        self._machine = RolloutMachine(partial(judge, bounds=SKETCH_BOUNDS_NS))
        self._random = random.Random(7)
        self._counts: dict[tuple[str, int], VersionSample] = {}
        self._add_note("digits", "version.ready", "version 4 is READY")

    def models(self) -> list[ModelView]:
        return [self.model(model.name) for model in super().models()]

    def model(self, name: str) -> ModelView:
        """With each version's part of the traffic."""
        found = super().model(name)
        share = {number: _share_bp(found, number) for number in (v.number for v in found.versions)}
        views = tuple(replace(view, traffic_bp=share[view.number]) for view in found.versions)
        return replace(found, versions=views)

    def samples(self) -> list[VersionSample]:
        return list(self._counts.values())

    def tick(self, elapsed_s: float) -> None:
        """Answer requests for so long, then look at the rollouts."""
        for model in self.models():
            load = 1 + 0.25 * math.sin(time.monotonic() / 7)
            for view in model.versions:
                share = view.traffic_bp / 10_000
                rate = RATES.get(model.name, 0) * load * share
                if view.state == "READY":
                    self._answer(
                        model, view.number, round(rate * elapsed_s + self._random.random())
                    )
        for rollout in list(self.running.values()):
            if rollout.is_active:
                self._look(rollout, elapsed_s)

    def _answer(self, model: ModelView, number: int, requests: int) -> None:
        key = model.name, number
        old = self._counts.get(key) or VersionSample(
            *key, 0, 0, 0, 0, 0, {}, (0,) * (len(ROW_BOUNDS) + 1)
        )
        errors = sum(self._random.random() < self.errors for _ in range(requests))
        sizes = [
            min(60, int(self._random.expovariate(1 / ROWS)) + 1) for _ in range(requests // ROWS)
        ]
        rows = list(old.batch_rows)
        for size in sizes:
            rows[next(at for at, bound in enumerate(ROW_BOUNDS) if size <= bound)] += 1
        self._counts[key] = VersionSample(
            *key,
            old.requests + requests,
            old.errors + errors,
            old.rows + sum(sizes),
            old.batches + len(sizes),
            self._random.randrange(4),
            Counter(old.latency) + Counter(self._durations(requests, 2.4)),
            tuple(rows),
        )

    def _durations(self, count: int, median_ms: float) -> dict[int, int]:
        draws = (self._random.lognormvariate(math.log(median_ms * 1e6), 0.35) for _ in range(count))
        return dict(Counter(sketch_bucket(int(ns)) for ns in draws))

    def _arm(self, requests: int, errors: float, slower: float) -> Arm:
        failed = sum(self._random.random() < errors for _ in range(requests))
        compute = self._durations(requests // 4, 1.1 * slower)
        return Arm(requests, failed, 0, self._durations(requests, 2.4 * slower), {ROWS: compute})

    def _look(self, rollout: Rollout, elapsed_s: float) -> None:
        delta = Observation()
        if rollout.state in (RolloutState.STEPPING, RolloutState.PAUSED):
            part = rollout.spec.steps[rollout.step].weight_bp / 10_000
            total = RATES[rollout.model] * elapsed_s
            delta = Observation(
                self._arm(round(total * part), self.errors, self.slower),
                self._arm(round(total * (1 - part)), 0.001, 1.0),
            )
        facts = Facts(
            now_s=time.time(), canary=VersionState.READY, is_stable_ready=True, is_settled=True,
            delta=delta,
        )  # fmt: skip
        self._keep(rollout, self._machine.advance(rollout, facts), "gateway")

    def _keep(self, before: Rollout, step, actor: str) -> Rollout:
        after = step.rollout
        self.running[after.id] = after
        for note in step.notes:
            self._add_note(after.model, note.kind, note.text, actor, after.id, note.numbers)
        model = self._models[after.model]
        moved = (before.state, before.step) != (after.state, after.step)
        self._models[after.model] = replace(
            model,
            route=route_of(after).to_wire(),
            route_by="rollout" if after.is_active else "hand",
            rollout=after.id if after.is_active else None,
            revision=model.revision + moved,
        )
        return after

    def _add_note(self, model, kind, text, actor="gateway", rollout="", numbers=None) -> None:
        number = len(self.event_records) + 1
        event = EventRecord(time.time(), kind, model, actor, text, rollout, numbers or {}, number)
        self.event_records.append(event)
        self._news.set()

    @staticmethod
    def spec(**fields) -> RolloutSpec:
        return RolloutSpec.model_validate(fields)

    async def plan(self, model: str, spec: RolloutSpec) -> dict:
        return {"steps": len(spec.steps), "canary": spec.canary}

    async def start_rollout(self, model: str, spec: RolloutSpec, by: str) -> Rollout:
        found = self._models[model]
        if found.rollout is not None:
            raise Conflict("a rollout of this model is active: abort it or wait for its end")
        stable = spec.stable or found.route["shares"][-1]["version"]
        now_s, number = time.time(), len(self.running) + 1
        chosen = spec.model_copy(update={"stable": stable})
        made = Rollout(f"{number:08x}", model, chosen, "salt", now_s, now_s)
        self.running[made.id] = made
        text = f"rollout of version {spec.canary}, in place of version {stable}"
        self._add_note(model, "rollout.created", text, by, made.id)
        self._models[model] = replace(found, rollout=made.id, revision=found.revision + 1)
        return made

    async def command(self, model, id_, verb, by, revision) -> Rollout:
        before = await self.rollout(model, id_)
        if revision is not None and revision != self._models[model].revision:
            raise PreconditionFailed("stale")
        self.calls.append((verb, model, id_, by))
        return self._keep(before, self._machine.command(before, verb, time.time(), by), by)


def _share_bp(model: ModelView, number: int) -> int:
    shares = model.route["shares"] if model.route else ()
    return sum(share["weight_bp"] for share in shares if share["version"] == number)


async def keep_ticking(plane: LivePlane) -> None:
    """Until it is cancelled."""
    while True:
        plane.tick(TICK_S)
        await asyncio.sleep(TICK_S)


@asynccontextmanager
async def serving(plane: LivePlane, port: int = 0) -> AsyncIterator[str]:
    """An admin port of the plane, whose time passes; its address."""
    server = AdminServer(plane, load_server_settings(model_repository=Path("/nonexistent")))
    sock = socket.create_server(("127.0.0.1", port))
    ticks = asyncio.create_task(keep_ticking(plane))
    await server.start(sock)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        ticks.cancel()
        await server.stop()


async def _serve(port: int) -> None:
    plane = LivePlane(Path("/nonexistent"))
    steps = [{"weight_bp": bp, "min_duration_s": 60} for bp in (500, 2500, 5000)]
    await plane.start_rollout("digits", plane.spec(canary=4, steps=steps), "ci")
    async with serving(plane, port) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
