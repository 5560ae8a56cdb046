"""Rollouts, and the audit log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

from gateway.admin.models import page_of
from gateway.admin.operations import PREFIX, Answer, Call, Match, Operation
from gateway.admin.schema import (
    AuditPage,
    Nothing,
    NumberPageQuery,
    PageQuery,
    PromoteQuery,
    RolloutPage,
)
from gateway.rollout.record import Rollout
from gateway.rollout.spec import RolloutSpec
from gateway.security.keys import Role

if TYPE_CHECKING:
    from gateway.control.plane import ControlPlane

_ROLLOUTS = f"{PREFIX}/models/{{model}}/rollouts"

_VERBS = {
    "pause": "Keep a rollout where it is",
    "resume": "Let a rollout go on",
    "promote": "Go to the next step, or with full=true to the end",
    "abort": "Roll back",
    "retry": "Begin an aborted or failed rollout again",
}


class RolloutHandlers:
    """The operations on rollouts.

    Args:
        plane: carries them out.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def operations(self) -> list[Operation]:
        """All of them."""
        return [
            Operation(
                "GET", f"{PREFIX}/rollouts", "Rollouts of all models, newest first", self.all,
                RolloutPage, query=PageQuery,
            ),
            Operation(
                "GET", _ROLLOUTS, "A model's rollouts, newest first", self.rollouts, RolloutPage,
                query=PageQuery,
            ),
            Operation(
                "POST", _ROLLOUTS, "Start a rollout; with dry_run only say what it would do",
                self.start, Rollout | dict[str, Any], Role.DEPLOYER, RolloutSpec,
                match=Match.IF_GIVEN, statuses=(201, 200), replays=True,
            ),
            Operation("GET", f"{_ROLLOUTS}/{{id}}", "One rollout", self.rollout, Rollout),
            *(
                Operation(
                    "POST", f"{_ROLLOUTS}/{{id}}:{verb}", summary, self._command(verb), Rollout,
                    Role.DEPLOYER, query=PromoteQuery if verb == "promote" else Nothing,
                    match=Match.ALWAYS, replays=True,
                )
                for verb, summary in _VERBS.items()
            ),
            Operation(
                "GET", f"{PREFIX}/audit", "The audit log, oldest first", self.audit, AuditPage,
                Role.ADMIN, query=NumberPageQuery, is_global=True,
            ),
        ]  # fmt: skip

    async def all(self, call: Call) -> Answer:
        """Of all models that the caller may see."""
        return await self._page(call, call.identity.models or None)

    async def rollouts(self, call: Call) -> Answer:
        """Of one model."""
        self._plane.registry.model(call.model)  # NotFound
        return await self._page(call, {call.model})

    async def start(self, call: Call) -> Answer:
        """Start one, or only say what it would do."""
        if call.body.dry_run:
            return Answer(await self._plane.plan(call.model, call.body))
        rollout = await self._plane.start_rollout(call.model, call.body, call.actor)
        return self._shown(call, rollout, 201)

    async def rollout(self, call: Call) -> Answer:
        """One."""
        return self._shown(call, await self._plane.rollout(call.model, call.name("id")))

    async def audit(self, call: Call) -> Answer:
        """Who has changed what."""
        query = call.query
        found = await self._plane.audit(query.after, query.limit)
        return Answer({"audit": found, "next": found[-1].id if found else query.after})

    def _command(self, verb: str) -> Callable[[Call], Awaitable[Answer]]:
        async def command(call: Call) -> Answer:
            is_full = verb == "promote" and call.query.full
            rollout = await self._plane.command(
                call.model,
                call.name("id"),
                "promote_full" if is_full else verb,
                call.actor,
                call.revision,
            )
            return self._shown(call, rollout)

        return command

    async def _page(self, call: Call, models: Collection[str] | None) -> Answer:
        limit = call.query.limit
        found = await self._plane.rollouts(models, call.query.after, limit + 1)
        page, token = page_of(found, limit, _id_of)
        return Answer({"rollouts": [each.to_document() for each in page], "next": token})

    def _shown(self, call: Call, rollout: Rollout, status: int = 200) -> Answer:
        revision = self._plane.registry.model(call.model).revision
        return Answer(rollout.to_document(), status, revision)


def _id_of(rollout: Rollout) -> str:
    return rollout.id
