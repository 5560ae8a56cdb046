"""``gateway rollout watch``: follows a rollout to its end, on a terminal as a view, elsewhere line by line.

It asks twice a second instead of keeping a stream open: nothing needs to be mended when the server is
restarted, and the rollout that it finds then is the one that it watched.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

from rich.console import Console, Group
from rich.live import Live

from gateway.cli import admin_tables as tables
from gateway.cli.admin_client import PAGE_ENTRIES, AdminClient, Document, Unreachable, model_path

POLL_S = 0.5

PATIENCE_S = 60.0
"""Time that a server which does not answer is waited for: it may be restarted, and goes on then."""

SHOWN_EVENTS = 10
"""Events beneath the view, the newest last."""

_ENDS = frozenset({"SUCCEEDED", "ABORTED", "FAILED"})


class Follower:
    """What there is to know of a rollout, and what has happened since it was asked last."""

    def __init__(self, client: AdminClient, model: str, rollout_id: str) -> None:
        self._client = client
        self._path = model_path(model, "rollouts", rollout_id)
        self._query = {"model": model, "rollout": rollout_id, "limit": PAGE_ENTRIES}
        self._after = 0

    def ask(self) -> tuple[Document, list[Document]]:
        """The rollout as it is, and the events that came since, those of its end with its end."""
        rollout = self._client.get(self._path)
        events: list[Document] = []
        while page := self._client.get("/events", after=self._after, **self._query)["events"]:
            self._after = page[-1]["id"]
            events += page
        return rollout, events

    def ask_patiently(self) -> Iterator[tuple[Document, list[Document]]]:
        """Ask until it has ended. Unreachable when the server does not answer for too long."""
        answered_s = time.monotonic()
        while True:
            try:
                rollout, events = self.ask()
            except Unreachable:
                if time.monotonic() - answered_s > PATIENCE_S:
                    raise
            else:
                answered_s = time.monotonic()
                yield rollout, events
                if rollout["state"] in _ENDS:
                    return
            time.sleep(POLL_S)


def watch(client: AdminClient, model: str, rollout_id: str, *, is_quiet: bool) -> Document:
    """Show a rollout until it has ended; as it is then.

    Args:
        client: of the server that carries it out.
        model: its model.
        rollout_id: its id.
        is_quiet: show nothing.
    """
    console = Console(quiet=True) if is_quiet else tables.console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    shown: deque[Document] = deque(maxlen=SHOWN_EVENTS)
    rollout: Document = {}
    with live or nullcontext():
        for rollout, events in Follower(client, model, rollout_id).ask_patiently():
            shown.extend(events)
            if live is not None:
                log = [tables.event_line(event) for event in shown]
                live.update(Group(tables.rollout(rollout, time.time()), *log), refresh=True)
            else:
                for event in events:
                    console.print(tables.event_line(event), soft_wrap=True)
    return rollout
