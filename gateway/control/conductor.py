"""Leads rollouts: looks, lets the machine decide, writes, and only then acts.

A look reads counters and states, and gives them to `rollout.machine`, which gives a new record or the old
one. A new record is written in one transaction with the model's route, its labels and the events; then the
route is published. So a crash at any moment leaves a store from which the same step goes on, and no front
end ever has a route that the store does not know. But for one: where a roll-back cannot be written, its
route is published all the same, and it is written before anything else is.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from gateway.clock import steady_s, wall_s
from gateway.control.asking import Asking, check_asks
from gateway.control.counting import Counting
from gateway.control.journal import GATEWAY, Journal, event
from gateway.control.models import ModelControl, ModelSupervision, version_entry
from gateway.control.version import VersionSupervision
from gateway.errors import (
    Conflict,
    GatewayError,
    InvalidRequest,
    PreconditionFailed,
    Unavailable,
)
from gateway.rollout import analysis
from gateway.rollout.facts import Facts, Note, Step
from gateway.rollout.machine import RolloutMachine, Verb, wants_canary
from gateway.rollout.record import ROUTING, Rollout, RolloutState, route_of
from gateway.rollout.spec import RolloutSpec
from gateway.serving.routes import VersionState
from gateway.settings import ServerSettings
from gateway.store.changes import AddAudit, Change, PutModel, PutRollout
from gateway.store.records import AuditRecord, ModelRecord, RolloutRecord
from gateway.telemetry.ledger import SKETCH_BOUNDS_NS

log = logging.getLogger("gateway.control")

LOOK_S = 0.25
"""Pause between two looks at a rollout: the kill-switch acts within a second of traffic."""

STABLE, CANARY = "stable", "canary"
"""Labels that a rollout moves."""


@dataclass(slots=True)
class _Lead:
    """One rollout that is led, and what is known of it besides its record."""

    rollout: Rollout
    asking: Asking
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    counting: Counting = field(default_factory=Counting)
    begun_attempt: int = 0  # whose load of the canary was begun by this process
    cannot_load: str = ""
    deaths: int = 0  # of the canary's workers, in this attempt
    starts: int = 0  # of its workers, when they were last looked at
    is_settled: bool = False
    owed: Callable[[], Awaitable[None]] | None = None  # writes what was acted on and not written
    complaint: str = ""  # that was logged last
    loading: asyncio.Task[None] | None = None
    task: asyncio.Task[None] | None = None


class Conductor:
    """All rollouts of this server. Belongs to the event loop.

    Args:
        settings: the server's.
        models: by name.
        control: for loading and unloading.
        journal: where everything is written.
        publish: tells front ends what has changed of routes; whether all of them have acknowledged it.
        forbid: has a version of a model not loaded any more, whatever the policy says.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: dict[str, ModelSupervision],
        control: ModelControl,
        journal: Journal,
        publish: Callable[[], Awaitable[bool]],
        forbid: Callable[[str, int], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._models = models
        self._control = control
        self._journal = journal
        self._publish = publish
        self._forbid = forbid
        self._machine = RolloutMachine(partial(analysis.judge, bounds=SKETCH_BOUNDS_NS))
        self._leads: dict[str, _Lead] = {}

    def resume(self, rollouts: Iterable[Rollout]) -> None:
        """Take up what the store says is active; led from `start` on."""
        for rollout in rollouts:
            self._leads[rollout.model] = _Lead(rollout, Asking(self._settings))
            if (model := self._models.get(rollout.model)) is not None:
                model.claimed, model.standby = _claims(rollout), standby_of(rollout)

    def start(self) -> None:
        """Begin to lead: the front ends are there."""
        for lead in self._leads.values():
            self._begin(lead)

    def close(self) -> None:
        """Stop leading; the records stay as they are."""
        for lead in self._leads.values():
            lead.asking.close()
            for task in (lead.task, lead.loading):
                if task is not None:
                    task.cancel()

    def active(self, model: str) -> Rollout | None:
        """The rollout of a model that has not ended."""
        lead = self._leads.get(model)
        return lead.rollout if lead is not None and lead.rollout.is_active else None

    def find(self, identity: str) -> Rollout | None:
        """A rollout that is led, or was until a moment ago."""
        found = (lead.rollout for lead in self._leads.values())
        return next((rollout for rollout in found if rollout.id == identity), None)

    # What operators ask for

    async def checked(self, name: str, spec: RolloutSpec) -> RolloutSpec:
        """A specification with everything filled in, if it can be carried out now.

        Raises:
            NotFound: the model or a version of it is unknown.
            InvalidRequest: it makes no sense for this model or server.
            Conflict: a rollout of the model is active, or the stable version is not READY.
        """
        check_asks(spec, self._settings)
        entry = await self._control.scan(name)
        version_entry(entry, spec.canary)
        if (active := self.active(name)) is not None:
            raise Conflict(f"rollout {active.id} of the model is active: end it first")
        model = self._models.get(name)
        route = None if model is None else model.route
        stable = spec.stable or (route.main if route is not None else None)
        if model is None or stable is None:
            raise Conflict("no version of the model answers: load one first")
        if route is not None and route.main != stable:
            raise Conflict(f"version {route.main} answers, not version {stable}: replace that one")
        if stable == spec.canary:
            raise InvalidRequest(f"version {stable} is the one that answers already")
        found = model.versions.get(stable)
        if found is None or found.state is not VersionState.READY:
            raise Conflict(f"version {stable}, which is to be replaced, is not READY")
        return spec.model_copy(update={"stable": stable})

    async def create(self, name: str, spec: RolloutSpec, by: str) -> Rollout:
        """Begin a rollout. See `checked` for what it raises."""
        spec = await self.checked(name, spec)
        old = self._leads.get(name)
        if old is not None:
            await self._stop(old)
            if self._leads.get(name) is not old:
                raise Conflict("another rollout of the model has begun")
        now_s = steady_s()
        rollout = Rollout(
            id=secrets.token_hex(8),
            model=name,
            spec=spec,
            salt=secrets.token_hex(16),
            created_s=now_s,
            changed_s=now_s,
        )
        lead = _Lead(rollout, Asking(self._settings))
        note = Note(
            "rollout.created",
            f"from version {rollout.stable} to {rollout.canary} in {len(spec.steps)} steps",
        )
        self._leads[name] = lead
        try:
            async with lead.lock:
                await self._commit(lead, Step(rollout, (note,)), by, "rollout.create", None)
        except BaseException:
            del self._leads[name]
            raise
        self._begin(lead)
        return rollout

    async def command(self, rollout: Rollout, verb: Verb, by: str, revision: int | None) -> Rollout:
        """Carry out a verb of `RolloutMachine.command`, which says what it raises.

        Args:
            rollout: as it was read; of one that is led the newest record counts.
            verb: what to do.
            by: who asks.
            revision: the model's on which it was decided; None: any.
        """
        lead = self._leads.get(rollout.model)
        if lead is None or lead.rollout.id != rollout.id:
            if self.active(rollout.model) is not None:
                raise Conflict("another rollout of the model is active")
            old, lead = lead, _Lead(rollout, Asking(self._settings))
            self._step(rollout, verb, by, revision)  # refuses before anything is changed
            if old is not None:
                await self._stop(old)
                if self._leads.get(rollout.model) is not old:
                    raise Conflict("another rollout of the model has begun")
            self._leads[rollout.model] = lead
        async with lead.lock:
            if lead.owed is not None:
                await lead.owed()
            step = self._step(lead.rollout, verb, by, revision)
            if verb == "retry" and step.rollout.is_active:
                lead.counting, lead.cannot_load = Counting(), ""
            await self._commit(lead, step, by, f"rollout.{verb}", lead.rollout, revision)
        self._begin(lead)
        return lead.rollout

    def _step(self, rollout: Rollout, verb: Verb, by: str, revision: int | None) -> Step:
        """What a verb makes of a rollout. PreconditionFailed, Conflict."""
        model = self._models.get(rollout.model)
        _check_revision(model, revision)
        step = self._machine.command(rollout, verb, steady_s(), by)
        if verb in ("promote", "promote_full") and step.rollout is not rollout:
            canary = None if model is None else model.versions.get(rollout.canary)
            if canary is None or not canary.ready_seats():
                raise Conflict(
                    f"version {rollout.canary} cannot answer now: promote it once it is READY again"
                )
        if verb == "retry" and step.rollout.is_active:
            route = None if model is None else model.route
            if route is None or route.main != rollout.stable:
                raise Conflict(
                    f"version {rollout.stable}, which is to be replaced, does not answer"
                )
        return step

    # Looking

    def _begin(self, lead: _Lead) -> None:
        if lead.task is None or lead.task.done():
            lead.task = asyncio.get_running_loop().create_task(self._lead(lead))

    async def _stop(self, lead: _Lead) -> None:
        """Stop leading a rollout that has ended; never in the middle of an unload."""
        lead.asking.close()
        async with lead.lock:
            if lead.task is not None:
                lead.task.cancel()

    async def _lead(self, lead: _Lead) -> None:
        """Look until the rollout has ended, and what it kept loaded is not kept any more."""
        while True:
            try:
                async with lead.lock:
                    if not lead.rollout.is_active and not self._is_warm(lead):
                        await self._let_go(lead.rollout)
                        return
                    await self._look(lead)
                lead.complaint = ""
            except GatewayError as error:
                if error.message != lead.complaint:
                    lead.complaint = error.message
                    log.error("rollout %s: %s; looking again", lead.rollout.id, error.message)
            except Exception:
                log.exception("rollout %s: a look failed; looking again", lead.rollout.id)
            await asyncio.sleep(LOOK_S)

    def _is_warm(self, lead: _Lead) -> bool:
        """Whether both versions are kept for a while, so that going back takes no load."""
        rollout = lead.rollout
        if rollout.state is RolloutState.SUCCEEDED:
            return 0 <= steady_s() - rollout.changed_s < rollout.spec.abort_keep_warm_s
        return wants_canary(rollout, steady_s())

    async def _look(self, lead: _Lead) -> None:
        rollout = lead.rollout
        model = self._models.get(rollout.model)
        if model is None or not rollout.is_active:
            return
        if lead.owed is not None:
            await lead.owed()
            return
        if lead.begun_attempt != rollout.attempt:
            lead.begun_attempt = rollout.attempt
            lead.deaths = lead.starts = 0
            lead.loading = asyncio.get_running_loop().create_task(self._load_canary(lead))
        if lead.loading is not None and not lead.loading.done():
            return  # before its load has begun, nobody can tell whether the canary is gone
        if not lead.is_settled:
            lead.is_settled = await self._publish()
        canary, stable = (model.versions.get(n) for n in (rollout.canary, rollout.stable))
        queries, gates = lead.asking.take(rollout)
        broken = lead.cannot_load or _crashing(lead, canary)
        facts = Facts(
            now_s=steady_s(),
            canary=VersionState.FAILED if broken else _state(canary),
            canary_reason=broken or (canary.reason if canary is not None else ""),
            is_stable_ready=_state(stable) is VersionState.READY,
            is_settled=lead.is_settled,
            delta=lead.counting.since_last(
                canary, stable, sliced=rollout.spec.baseline == "equal_slice"
            ),
            queries=queries,
            gates=gates,
        )
        try:
            await self._commit(lead, self._machine.advance(rollout, facts))
        except GatewayError:
            lead.counting.undo()
            raise
        lead.asking.ask(lead.rollout)

    async def _load_canary(self, lead: _Lead) -> None:
        """Begin to load it, once an attempt; a version that is served already is left alone."""
        name = lead.rollout.model
        try:
            async with self._control.operating(name) as model:
                await model.begin(await self._control.scan(name), lead.rollout.canary)
        except GatewayError as error:
            lead.cannot_load = error.message

    async def _let_go(self, rollout: Rollout) -> None:
        """Unload what only the rollout kept loaded: a new version that lost, an old one that is replaced."""
        async with self._control.operating(rollout.model) as model:
            if model.claimed != _claims(rollout):
                return  # another one needs them
            model.claimed = frozenset()
            is_done = rollout.state is RolloutState.SUCCEEDED
            number = rollout.stable if is_done else rollout.canary
            version = model.versions.get(number)
            if version is None or model.is_needed(number):
                return
            if version.state is VersionState.FAILED:
                await self._forbid(rollout.model, number)  # or it would end the next start
            elif model.is_chosen(await self._control.scan(rollout.model), number):
                return
            await model.unload_version(number)

    # Deciding

    async def _commit(
        self,
        lead: _Lead,
        step: Step,
        by: str = GATEWAY,
        action: str | None = None,
        before: Rollout | None = None,
        revision: int | None = None,
    ) -> None:
        """Write a new record and what follows from it, then act on it.

        ``revision`` is the model's on which it was decided; None: any. PreconditionFailed.
        """
        rollout, old = step.rollout, lead.rollout
        if rollout is old and action != "rollout.create":
            return
        model = self._models[rollout.model]
        async with model.writing:
            _check_revision(model, revision)
            number = await self._journal.next_revision(model.record)
            record = self._decided(model, rollout, number, is_moved=bool(step.notes))
            changes = _changes(model, step, record, by)
            if action is not None:
                changes.append(_audit(by, action, before, rollout))
            try:
                await self._journal.write(*changes)
            except Unavailable:
                if rollout.state is RolloutState.ABORTING:
                    # The one thing that does not wait for a disk: who rolls back, does so at once.
                    lead.owed = partial(self._commit, lead, step, by, action, before)
                    model.record = replace(model.record, route=record.route, labels=record.labels)
                    await self._publish()
                raise
            lead.owed = None
            lead.rollout = rollout
            model.claimed, model.standby = _claims(rollout), standby_of(rollout)
            is_routed_anew = (record.route, record.labels) != (
                model.record.route,
                model.record.labels,
            )
            model.record = record
        if is_routed_anew:
            lead.is_settled = await self._publish()

    @staticmethod
    def _decided(
        model: ModelSupervision, rollout: Rollout, revision: int, *, is_moved: bool
    ) -> ModelRecord:
        """The model's record while its rollout is as it is, with its next revision if that is another."""
        record = model.record
        route, labels = route_of(rollout).to_wire(), _labels(record.labels, rollout)
        if not is_moved and (record.route, dict(record.labels)) == (route, labels):
            return record
        return replace(record, revision=revision, route=route, labels=labels)


def _check_revision(model: ModelSupervision | None, revision: int | None) -> None:
    if revision is not None and (model is None or revision != model.record.revision):
        raise PreconditionFailed("the model has changed since it was read: read it again")


def _changes(model: ModelSupervision, step: Step, record: ModelRecord, by: str) -> list[Change]:
    """A rollout's new record, the model's where it is another, and the events."""
    rollout = step.rollout
    document = rollout.to_document()
    changes: list[Change] = [
        PutRollout(RolloutRecord(rollout.id, rollout.model, rollout.is_active, document))
    ]
    if record != model.record:
        changes.append(PutModel(record, model.record.revision))
    changes += [
        event(
            note.kind,
            rollout.model,
            note.text,
            actor=by,
            rollout=rollout.id,
            numbers=note.numbers,
        )
        for note in step.notes
    ]
    return changes


def _labels(labels: Mapping[str, int], rollout: Rollout) -> dict[str, int]:
    """A model's labels while its rollout is as it is."""
    held = {**labels, STABLE: rollout.stable}
    if rollout.state in (RolloutState.PROMOTING, RolloutState.SUCCEEDED):
        held[STABLE] = rollout.canary
    if rollout.state in ROUTING:
        held[CANARY] = rollout.canary
    elif held.get(CANARY) == rollout.canary:
        del held[CANARY]
    return held


def standby_of(rollout: Rollout) -> int | None:
    """The version that answers while a rollout's route leads to one that cannot yet."""
    return rollout.stable if rollout.is_active else None


def _claims(rollout: Rollout) -> frozenset[int]:
    """The versions that a rollout needs loaded; after its end for as long as they are kept warm."""
    return frozenset({rollout.stable, rollout.canary})


def _crashing(lead: _Lead, canary: VersionSupervision | None) -> str:
    """Why a canary whose workers die again and again is given up; empty where they do not.

    What it dies of is a request, which costs the version nothing as long as it is that request's doing. A
    canary has to answer for the requests that the stable version survives.
    """
    switch = lead.rollout.spec.kill_switch
    if switch is None or canary is None or canary.state is not VersionState.READY:
        return ""
    starts = sum(canary.worker_starts())
    lead.deaths += max(0, starts - lead.starts) if lead.starts else 0
    lead.starts = starts
    return f"its workers died {lead.deaths} times" if lead.deaths >= switch.worker_deaths else ""


def _state(version: VersionSupervision | None) -> VersionState | None:
    return None if version is None else version.state


def _audit(by: str, action: str, before: Rollout | None, after: Rollout) -> AddAudit:
    def shown(rollout: Rollout | None) -> dict[str, object] | None:
        if rollout is None:
            return None
        document = rollout.to_document()
        keys = ("id", "state", "pause", "step", "attempt", "reason")
        return {key: document[key] for key in keys} | (
            {"spec": document["spec"]} if action == "rollout.create" else {}
        )

    resource = f"models/{after.model}/rollouts/{after.id}"
    return AddAudit(AuditRecord(wall_s(), by, action, resource, shown(before), shown(after)))
