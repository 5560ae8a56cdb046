"""``gateway rollout``: starts, watches and steers rollouts on a running server."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from gateway.cli import admin_tables as tables
from gateway.cli.admin_client import AdminClient, Document, asks_server, model_path, name_argument
from gateway.errors import ConfigurationError, NotFound
from gateway.serving.routing import BASIS_POINTS
from gateway.yamlfile import read_yaml

DEFAULT_STEPS = "5,25,50"
"""Percent of the traffic. Most of what is wrong shows with the least harm in the first."""

HISTORY_ENTRIES = 20

_model = name_argument("model")
_id = name_argument("rollout_id", required=False)


_STEP_FIELDS = {
    "min_requests": "min_requests",
    "min_duration": "min_duration_s",
    "mirror": "mirror_percent",
}
"""Fields of every step, by the option that sets them."""


def _steps(text: str) -> list[Document]:
    """Steps from percents such as ``5,25,50``. ValueError: they are none."""
    percents = [float(part) for part in text.split(",")]
    if not all(0 <= percent <= 100 for percent in percents):
        raise ValueError("a weight is no percent")
    return [{"weight_bp": round(percent * BASIS_POINTS / 100)} for percent in percents]


def _given_steps(
    _context: click.Context, _option: click.Parameter, value: str | None
) -> list[Document] | None:
    try:
        return None if value is None else _steps(value)
    except ValueError:
        raise click.BadParameter(f"expected percents such as {DEFAULT_STEPS}") from None


def _metrics(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> list[Document]:
    """Metrics from ``SOURCE`` or ``SOURCE=MARGIN``."""
    metrics = []
    for value in values:
        source, separator, margin = value.partition("=")
        metric: Document = {"name": source, "source": source}
        if separator:
            try:
                metric["margin"] = float(margin)
            except ValueError:
                raise click.BadParameter("expected a number after '=', as errors=0.02") from None
        metrics.append(metric)
    return metrics


@click.group("rollout")
def rollout() -> None:
    """Replace a version step by step, and roll back by itself where the new one is worse."""


@rollout.command("start")
@_model
@click.option("--canary", metavar="N", type=click.IntRange(1), help="New version.")
@click.option(
    "--steps",
    metavar="P,P,…",
    callback=_given_steps,
    help=f"Percent of the requests that it gets, step by step [{DEFAULT_STEPS}].",
)
@click.option(
    "--min-requests",
    metavar="N",
    type=click.IntRange(0),
    help="Requests that it answers in each step at least [100].",
)
@click.option(
    "--min-duration", metavar="S", type=click.FloatRange(0), help="Seconds of a step at least [0]."
)
@click.option(
    "--sticky", metavar="KEY", help="header:NAME, cookie:NAME or ip: who stays with whom."
)
@click.option(
    "--metric",
    "metrics",
    metavar="SOURCE[=MARGIN]",
    callback=_metrics,
    multiple=True,
    help="errors, refusals, latency or compute; may be repeated [errors and compute].",
)
@click.option(
    "--mirror",
    metavar="PERCENT",
    type=click.FloatRange(0, 100),
    help="Requests of which it also gets a copy, whose answer nobody sees.",
)
@click.option(
    "--agreement",
    metavar="BOUND",
    type=click.FloatRange(0, 1),
    help="Least part of the copies whose largest output is the same; needs --mirror.",
)
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file with a specification; options override it.",
)
@click.option("--dry-run", is_flag=True, help="Only check it and print what it would do.")
@click.option("--watch", "is_watched", is_flag=True, help="Then watch it.")
@asks_server
def start(
    client: AdminClient,
    model: str,
    *,
    file: Path | None,
    dry_run: bool,
    is_watched: bool,
    is_json: bool,
    **options: Any,
) -> None:
    """Start a rollout of MODEL from the version that answers now to version --canary."""
    spec = _spec({} if file is None else read_yaml(file, f"{file}"), options)
    if "canary" not in spec:
        raise click.UsageError("--canary, or canary in --file, is needed")
    if dry_run:
        spec["dry_run"] = True
    made = client.post(model_path(model, "rollouts"), spec)
    if spec.get("dry_run"):
        tables.show(made, is_json=True)
    elif is_watched:
        _watch(client, model, made["id"], is_json=is_json)
    else:
        tables.show(made, is_json, lambda: tables.rollout(made, time.time()))


def _spec(base: Document, options: Document) -> Document:
    """What is sent: the file's specification, and over it what the command line says."""
    spec = {"steps": _steps(DEFAULT_STEPS), **base}
    if options["canary"] is not None:
        spec["canary"] = options["canary"]
    if options["sticky"] is not None:
        spec["sticky"] = {"key": options["sticky"]}
    if options["metrics"]:
        spec["metrics"] = options["metrics"]
    if options["steps"] is not None:
        spec["steps"] = options["steps"]
    of_steps = {field: options[name] for name, field in _STEP_FIELDS.items()}
    given = {field: value for field, value in of_steps.items() if value is not None}
    if given:
        spec["steps"] = [{**step, **given} for step in _entries(spec, "steps")]
    if options["agreement"] is not None:
        spec.setdefault("metrics", _default_metrics())
        agreement = {"name": "agreement", "source": "agreement", "bound": options["agreement"]}
        spec["metrics"] = [*_entries(spec, "metrics"), agreement]
    return spec


def _entries(spec: Document, name: str) -> list[Document]:
    """A list of a specification. ConfigurationError: a file has something else there."""
    entries = spec[name]
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        return entries
    raise ConfigurationError(f"{name}: expected a list of mappings")


def _default_metrics() -> list[Document]:
    """What a specification without metrics is judged by, written out."""
    from gateway.rollout.spec import DEFAULT_METRICS

    return [metric.model_dump(mode="json", exclude_unset=True) for metric in DEFAULT_METRICS]


@rollout.command("status")
@_model
@_id
@asks_server
def status(client: AdminClient, model: str, rollout_id: str | None, *, is_json: bool) -> None:
    """Show a rollout: the newest one of MODEL, or ROLLOUT_ID."""
    found = _find(client, model, rollout_id)
    tables.show(found, is_json, lambda: tables.rollout(found, time.time()))


@rollout.command("watch")
@_model
@_id
@asks_server
def watch(client: AdminClient, model: str, rollout_id: str | None, *, is_json: bool) -> None:
    """Watch a rollout until it ends; the exit status is 0 only where it succeeded.

    Ctrl-C ends the watching alone.
    """
    found = _find(client, model, rollout_id)
    _watch(client, model, found["id"], is_json=is_json)


@rollout.command("history")
@name_argument("model", required=False)
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1, 1000),
    default=HISTORY_ENTRIES,
    help=f"How many [{HISTORY_ENTRIES}].",
)
@asks_server
def history(client: AdminClient, model: str | None, limit: int, *, is_json: bool) -> None:
    """List rollouts of MODEL, or of all models, newest first."""
    path = "/rollouts" if model is None else model_path(model, "rollouts")
    found = client.get(path, limit=limit)["rollouts"]
    tables.show({"rollouts": found}, is_json, lambda: tables.rollouts(found, time.time()))


@rollout.command("pause")
@_model
@_id
@asks_server
def pause(client: AdminClient, model: str, rollout_id: str | None, *, is_json: bool) -> None:
    """Stay at this step until resumed; a canary that gets worse is still rolled back."""
    _command(client, model, rollout_id, "pause", is_json=is_json)


@rollout.command("resume")
@_model
@_id
@asks_server
def resume(client: AdminClient, model: str, rollout_id: str | None, *, is_json: bool) -> None:
    """Go on after a pause."""
    _command(client, model, rollout_id, "resume", is_json=is_json)


@rollout.command("promote")
@_model
@_id
@click.option("--full", is_flag=True, help="Give the new version everything at once.")
@asks_server
def promote(
    client: AdminClient, model: str, rollout_id: str | None, *, full: bool, is_json: bool
) -> None:
    """Go on to the next step, whatever this one still waits for."""
    _command(client, model, rollout_id, "promote?full=true" if full else "promote", is_json=is_json)


@rollout.command("abort")
@_model
@_id
@asks_server
def abort(client: AdminClient, model: str, rollout_id: str | None, *, is_json: bool) -> None:
    """Roll back to the version that answered before, now."""
    _command(client, model, rollout_id, "abort", is_json=is_json)


@rollout.command("retry")
@_model
@_id
@asks_server
def retry(client: AdminClient, model: str, rollout_id: str | None, *, is_json: bool) -> None:
    """Begin a rollout that was rolled back, or could not load, from its first step again."""
    _command(client, model, rollout_id, "retry", is_json=is_json)


def _command(
    client: AdminClient, model: str, rollout_id: str | None, verb: str, *, is_json: bool
) -> None:
    found = _find(client, model, rollout_id)
    path = model_path(model, "rollouts", found["id"])
    told = client.post(f"{path}:{verb}", etag=client.etag(model))
    tables.show(told, is_json, lambda: tables.rollout_line(told))


def _find(client: AdminClient, model: str, rollout_id: str | None) -> Document:
    """A rollout; without an id the active one, which is the newest but after a retry, or the newest."""
    rollout_id = rollout_id or client.get(model_path(model))["rollout"]
    if rollout_id is not None:
        return client.get(model_path(model, "rollouts", rollout_id))
    newest = client.get(model_path(model, "rollouts"), limit=1)["rollouts"]
    if not newest:
        raise NotFound(f"{model} had no rollout yet: start one with gateway rollout start")
    return dict(newest[0])


def _watch(client: AdminClient, model: str, rollout_id: str, *, is_json: bool) -> None:
    """Watch it to its end and end the command with the status that it earned."""
    from gateway.cli import rollout_watch

    ended = rollout_watch.watch(client, model, rollout_id, is_quiet=is_json)
    tables.show(ended, is_json)
    sys.exit(0 if ended["state"] == "SUCCEEDED" else 1)
