"""Composition: from settings to a running server."""

from __future__ import annotations

import importlib.util
import os
import socket
from contextlib import ExitStack

import uvloop

from gateway.admin.server import AdminServer
from gateway.control import repository
from gateway.control.supervisor import Supervisor
from gateway.errors import ConfigurationError
from gateway.security.origin import is_loopback
from gateway.settings import ServerSettings
from gateway.store.place import state_of
from gateway.store.store import AsyncStore, Store
from gateway.telemetry import logs

BACKLOG = 1024
"""Connections that the kernel holds for each front end that is busy or being replaced."""


def serve(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: what is wrong with settings, repository, ports or installation.
        LoadError: a version cannot be loaded at start.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    logs.configure(settings.log_level, settings.log_format)
    check_runtime()
    models = repository.scan(settings.model_repository)
    if not any(model.versions for model in models):
        raise ConfigurationError(
            "the model repository has no model: expected <model>/<version>/model.onnx in it"
        )
    with ExitStack() as stack:
        data = [stack.enter_context(_listen(settings.host, settings.port, "port"))]
        while len(data) < settings.frontends:
            data.append(stack.enter_context(_listen_beside(data[0])))
        metrics = stack.enter_context(_listen(settings.host, settings.metrics_port, "metrics_port"))
        admin = stack.enter_context(_listen(settings.admin_host, settings.admin_port, "admin_port"))
        place = stack.enter_context(state_of(settings))
        store = Store(place.url)
        store.open()
        stack.callback(store.close)
        _check_keys(settings, store)
        secret = store.secret(place.folder)

        async def run() -> None:
            supervisor = Supervisor(
                settings, models, data, metrics, admin, AsyncStore(store), place.url, secret
            )
            await supervisor.prepare()  # first: without its keys the admin port would ask for none
            port = AdminServer(supervisor.plane, settings)
            await port.start(admin)
            try:
                await supervisor.run()
            finally:
                await port.stop()

        uvloop.run(run())


def _check_keys(settings: ServerSettings, store: Store) -> None:
    """ConfigurationError where others could reach the admin port and nobody needs a key."""
    if not is_loopback(settings.admin_host) and not store.keys():
        raise ConfigurationError(
            f"admin_host: the admin port on {settings.admin_host} needs an API key: "
            "make one first with: gateway keys create NAME --role admin --model-repository DIR"
        )
    if settings.data_keys and not store.keys():
        raise ConfigurationError(
            "data_keys: there is no API key that requests could bring: "
            "make one first with: gateway keys create NAME --role infer --model-repository DIR"
        )


def check_runtime() -> None:
    """ConfigurationError unless ONNX Runtime is there; it is not imported here, workers do."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigurationError(
            "ONNX Runtime is not installed: pip install 'inference-gateway[cpu]', or [gpu] for NVIDIA"
        )


def _listen(host: str, port: int, setting: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigurationError(
            f"{setting}: cannot listen on {host}:{port}: {error.strerror or error}"
        ) from None
    return sock


def _listen_beside(first: socket.socket) -> socket.socket:
    """Another socket on the first one's port; the kernel spreads connections over those that listen.

    The first listens before it shares the port: where another server has the port already, one of ours
    as well, the start ends instead of joining that one.
    """
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock = socket.socket(first.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(first.getsockname())
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigurationError(
            f"frontends: cannot share the data port: {error.strerror or error}"
        ) from None
    return sock
