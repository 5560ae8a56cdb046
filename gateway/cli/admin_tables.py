"""How the commands of the admin plane show what they were answered: tables for people, JSON for programs.

What a server says is shown as text on one line: it can neither steer the terminal nor be markup.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway.cli.bench_server import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

PLAIN_COLUMNS = 120
"""Width of a table where there is no terminal that has one."""

DIGEST_DIGITS = 12
"""Of a digest, as many as tell files apart."""

_GOOD = frozenset({"READY", "SUCCEEDED", "pass"})
_BAD = frozenset({"FAILED", "ABORTING", "ABORTED", "fail"})

_WRAPPED = frozenset(
    {"answers", "versions", "labels", "needs", "so far", "figures", "why", "models"}
)
"""Columns that give way where the terminal is narrow."""

_UNITS = (("d", 86_400), ("h", 3600), ("min", 60))

Document = Mapping[str, Any]


def show(
    document: Document, is_json: bool, render: Callable[[], RenderableType] | None = None
) -> None:
    """Print a document as JSON, or else what ``render`` makes of it; without it nothing."""
    if is_json:
        print(json.dumps(document, indent=2))  # noqa: T201
    elif render is not None:
        from rich.text import Text

        made = render()
        is_line = isinstance(made, str | Text)  # stays one, however long it is
        console().print(made, soft_wrap=is_line, markup=False)


def console() -> Console:
    """The terminal, or a plain one that is wide enough for tables."""
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=PLAIN_COLUMNS)


def models(views: Sequence[Document]) -> RenderableType:
    """A line for each model."""
    if not views:
        return "no models"
    table = _table("model", "answers", "decided by", "versions", "labels", "rollout")
    for view in views:
        versions = (f"{version['number']} {version['state']}" for version in view["versions"])
        _row(
            table,
            view["name"],
            traffic(view),
            view["route_by"],
            ", ".join(versions),
            _labels(view["labels"]),
            view["rollout"] or "",
        )
    return table


def model(view: Document, now_s: float) -> RenderableType:
    """One model with its versions."""
    from rich.console import Group

    table = _table("version", "state", "for", "traffic", "labels", "ready", "memory", "digest")
    for version in view["versions"]:
        ready = sum(worker["is_ready"] for worker in version["workers"])
        _row(
            table,
            version["number"],
            _state(version["state"]),
            age(version["since_s"], now_s),
            in_percent(version["traffic_bp"]),
            ", ".join(version["labels"]),
            f"{ready} of {len(version['workers'])}" if version["workers"] else "",
            in_bytes(version["memory_bytes"]) if version["memory_bytes"] else "",
            version["digest"][:DIGEST_DIGITS],
        )
    head = _text(f"{view['name']}: {traffic(view)}, decided by {view['route_by']}", "bold")
    reasons = [
        _text(f"version {version['number']}: {version['reason']}", "red")
        for version in view["versions"]
        if version["reason"]
    ]
    return Group(head, table, *reasons, *_signature_lines(view))


def version_line(name: str, view: Document) -> RenderableType:
    """What became of a version."""
    reason = f": {view['reason']}" if view["reason"] else ""
    return _text(f"{name} version {view['number']} is {view['state']}{reason}")


def traffic(view: Document) -> str:
    """Who answers a model's requests: each version with its part."""
    parts = [
        f"version {version['number']} {in_percent(version['traffic_bp'])}"
        for version in view["versions"]
        if version["traffic_bp"]
    ]
    return ", ".join(parts) or "nobody answers"


def rollouts(documents: Sequence[Document], now_s: float) -> RenderableType:
    """A line for each rollout."""
    if not documents:
        return "no rollouts"
    table = _table("rollout", "model", "versions", "state", "step", "begun", "why")
    for document in documents:
        _row(
            table,
            document["id"],
            document["model"],
            _versions(document),
            _state(document["state"]),
            f"{document['step'] + 1} of {len(document['spec']['steps'])}",
            f"{age(document['created_s'], now_s)} ago",
            document["reason"],
        )
    return table


def rollout_line(document: Document) -> RenderableType:
    """Where a rollout is, on one line."""
    pause = f" ({document['pause']})" if document["pause"] else ""
    reason = f": {document['reason']}" if document["reason"] else ""
    return _text(f"{document['model']} {_versions(document)} is {document['state']}{pause}{reason}")


def rollout(document: Document, now_s: float) -> RenderableType:
    """A rollout: where it is, its steps, and what the canary was judged by."""
    from rich.console import Group

    pause = f" ({document['pause']})" if document["pause"] else ""
    head = _text(f"{document['model']}: rollout of version {_versions(document)} ", "bold")
    head.append_text(_state(f"{document['state']}{pause}"))
    lines = [head, _text(f"{document['id']}, begun {age(document['created_s'], now_s)} ago", "dim")]
    if document["reason"]:
        lines.append(_text(document["reason"]))
    return Group(*lines, _steps(document, now_s), verdicts(document))


def _steps(document: Document, now_s: float) -> RenderableType:
    """A line for each step; the one that it is in says how far it is."""
    table = _table("", "step", "canary", "copies", "needs", "so far")
    is_in_step = document["state"] in ("STEPPING", "PAUSED")
    for number, step in enumerate(document["spec"]["steps"]):
        is_now = is_in_step and number == document["step"]
        is_done = number < document["step"] or document["state"] in ("PROMOTING", "SUCCEEDED")
        what = "requests" if step["weight_bp"] else "copies"
        needs = [f"{step['min_requests']:,} {what}"] if step["min_requests"] else []
        needs += [f"{step['min_duration_s']:g} s"] if step["min_duration_s"] else []
        needs += ["somebody to resume it"] if step["pause"] else []
        _row(
            table,
            "▶" if is_now else "✓" if is_done else "",
            number + 1,
            in_percent(step["weight_bp"]),
            f"{step['mirror_percent']:g} %" if step["mirror_percent"] else "",
            ", ".join(needs),
            _progress(document, now_s) if is_now else "",
        )
    return table


def _progress(document: Document, now_s: float) -> str:
    seen = document["seen"]
    compared = f", {seen['compared']:,} copies compared" if seen["compared"] else ""
    since = age(document["step_started_s"], now_s)
    return f"{seen['canary']['requests']:,} requests{compared} in {since}"


def verdicts(document: Document) -> RenderableType:
    """A line for each metric that was looked at, with the figures behind the verdict."""
    table = _table("metric", "verdict", "figures")
    for name, verdict in document["verdicts"].items():
        _row(table, name, _state(str(verdict["outcome"])), verdict["text"])
    return table if document["verdicts"] else ""


def event_line(event: Document) -> Text:
    """An event, on one line."""
    import time

    at = time.strftime("%H:%M:%S", time.localtime(event["at_s"]))
    who = "" if event["actor"] == "gateway" else f" (by {event['actor']})"
    return _text(f"{at} ", "dim").append_text(_text(f"{event['text']}{who}"))


def keys(documents: Sequence[Document], now_s: float) -> RenderableType:
    """A line for each key."""
    if not documents:
        return "no keys"
    table = _table("id", "name", "role", "models", "made", "state")
    for key in documents:
        _row(
            table,
            key["id"],
            key["name"],
            key["role"],
            ", ".join(key["models"]) or "all",
            f"{age(key['created_s'], now_s)} ago",
            _key_state(key, now_s),
        )
    return table


def _key_state(key: Document, now_s: float) -> str:
    if key["revoked_s"] is not None:
        return "revoked"
    if key["expires_s"] is None:
        return "valid"
    left_s = key["expires_s"] - now_s
    return f"valid for {age(now_s, now_s + left_s)}" if left_s > 0 else "expired"


def in_percent(weight_bp: int) -> str:
    """A weight; nothing for none."""
    return f"{weight_bp / 100:g} %" if weight_bp else ""


def in_bytes(count: float) -> str:
    """A number of bytes with the unit that fits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def age(since_s: float, now_s: float) -> str:
    """How long something has been so; clocks that differ make no negative time."""
    seconds = max(0.0, now_s - since_s)
    for unit, size_s in _UNITS:
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _versions(document: Document) -> str:
    return f"{document['spec']['stable']} → {document['spec']['canary']}"


def _labels(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{label} → {version}" for label, version in labels.items())


def _signature_lines(view: Document) -> list[Text]:
    """What the versions take and give, once for those that are alike."""
    lines = dict[str, list[str]]()
    for version in view["versions"]:
        signature = version["signature"]
        if signature is not None:
            text = f"{_tensors(signature['inputs'])} → {_tensors(signature['outputs'])}"
            lines.setdefault(text, []).append(str(version["number"]))
    return [_text(f"{', '.join(numbers)}: {text}", "dim") for text, numbers in lines.items()]


def _tensors(specs: Sequence[Document]) -> str:
    shown = []
    for spec in specs:
        shape = spec["shape"]
        dims = "…" if shape is None else ", ".join("?" if d is None else str(d) for d in shape)
        shown.append(f"{spec['name']} {spec['datatype']} [{dims}]")
    return ", ".join(shown)


def _state(word: str) -> Text:
    name = word.partition(" ")[0]
    return _text(word, "green" if name in _GOOD else "red" if name in _BAD else "yellow")


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(text), style)


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in _WRAPPED)
    return table


def _row(table: Table, *cells: object) -> None:
    from rich.text import Text

    table.add_row(*(cell if isinstance(cell, Text) else _text(str(cell)) for cell in cells))
