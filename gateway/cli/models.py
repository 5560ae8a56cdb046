"""``gateway models``: what a running server has, and what it is told to load, name and remove."""

from __future__ import annotations

import time
from pathlib import Path

import click

from gateway.cli import admin_tables as tables
from gateway.cli.admin_client import AdminClient, asks_server, model_path, name_argument

_model = name_argument("model")
_version = click.argument("version", type=click.IntRange(1))
_any_version = click.argument("version", type=click.IntRange(1), required=False)
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group("models")
def models() -> None:
    """Versions and labels of a running server's models."""


@models.command("list")
@asks_server
def list_models(client: AdminClient, *, is_json: bool) -> None:
    """Every model: its versions, who answers, its labels."""
    found = client.all_of("/models", "models")
    tables.show({"models": found}, is_json, lambda: tables.models(found))


@models.command("show")
@_model
@asks_server
def show_model(client: AdminClient, model: str, *, is_json: bool) -> None:
    """One model with all that is known of its versions."""
    view = client.get(model_path(model))
    tables.show(view, is_json, lambda: tables.model(view, time.time()))


@models.command("register")
@_model
@_version
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--source", metavar="PATH", help="A file that the server sees, instead of FILE.")
@click.option("--load", "is_loaded", is_flag=True, help="Load it, too.")
@asks_server
def register(
    client: AdminClient,
    model: str,
    version: int,
    file: Path | None,
    source: str | None,
    *,
    is_loaded: bool,
    is_json: bool,
) -> None:
    """Make FILE, an ONNX model, a version: for good, since a version's content never changes.

    FILE is sent to the server. With --source nothing is sent: PATH is the server's, beneath its model
    repository or one of its model_roots.
    """
    if (file is None) == (source is None):
        raise click.UsageError("either FILE or --source is needed")
    path = model_path(model, "versions", version)
    view = client.put(path, {"source": source}) if file is None else client.upload(path, file)
    if is_loaded:
        view = client.post(f"{path}:load", etag=client.etag(model))
    tables.show(view, is_json, lambda: tables.version_line(model, view))


@models.command("load")
@_model
@_any_version
@asks_server
def load(client: AdminClient, model: str, version: int | None, *, is_json: bool) -> None:
    """Load a version; without VERSION those that the model's settings choose, read anew."""
    _ask_to(client, "load", model, version, is_json=is_json)


@models.command("unload")
@_model
@_any_version
@_yes
@asks_server
def unload(
    client: AdminClient, model: str, version: int | None, *, yes: bool, is_json: bool
) -> None:
    """Unload a version that gets no requests; without VERSION all of them: the model stops answering."""
    if version is None:
        _confirm(yes, f"Unload every version of {model}? It will answer no more requests.")
    _ask_to(client, "unload", model, version, is_json=is_json)


@models.command("label")
@_model
@name_argument("label")
@_any_version
@click.option("--delete", "is_deleted", is_flag=True, help="Remove the label.")
@asks_server
def label_version(
    client: AdminClient,
    model: str,
    label: str,
    version: int | None,
    *,
    is_deleted: bool,
    is_json: bool,
) -> None:
    """Let LABEL lead to VERSION, which must be loaded."""
    if (version is None) != is_deleted:
        raise click.UsageError("either VERSION or --delete is needed")
    path = model_path(model, "labels", label)
    if is_deleted:
        document = client.delete(path, client.etag(model))
        line = f"{model}: label {label} is gone"
    else:
        document = client.put(path, {"version": version}, client.etag(model))
        line = f"{model}: label {label} leads to version {version}"
    tables.show(document, is_json, lambda: line)


@models.command("delete")
@_model
@_any_version
@_yes
@asks_server
def delete(
    client: AdminClient, model: str, version: int | None, *, yes: bool, is_json: bool
) -> None:
    """Remove a version that is not loaded, with its files; without VERSION the whole model."""
    what = model if version is None else f"{model} version {version}"
    etag = client.etag(model)  # of what the answer is about
    _confirm(yes, f"Remove {what} and its files for good?")
    client.delete(
        model_path(model) if version is None else model_path(model, "versions", version), etag
    )
    document = {"model": model, "version": version, "deleted": True}
    tables.show(document, is_json, lambda: f"{what} is removed")


def _ask_to(
    client: AdminClient, verb: str, model: str, version: int | None, *, is_json: bool
) -> None:
    """Load or unload, and show what became of it."""
    if version is not None:
        path = model_path(model, "versions", version)
        view = client.post(f"{path}:{verb}", etag=client.etag(model))
        tables.show(view, is_json, lambda: tables.version_line(model, view))
        return
    # What is done does not depend on what was there, and a model to be loaded may be new.
    client.post(f"{model_path(model)}:{verb}", etag="*")
    view = client.get(model_path(model))
    tables.show(view, is_json, lambda: tables.model(view, time.time()))


def _confirm(is_sure: bool, question: str) -> None:
    """Ask on stderr, so that stdout stays what programs read; ends the command where the answer is no."""
    if not is_sure:
        click.confirm(question, abort=True, err=True)
