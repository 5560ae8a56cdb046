"""The settings of the server.

A setting comes from the first of these that has it: flag, environment (``GATEWAY_PORT`` is ``port``),
YAML file, default. The line under each field is its description; ``docs/settings.md`` repeats it and a
test compares.

The environment is read here and not by pydantic-settings' own source, which ignores the variables
that it does not know and matches names in any case.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from gateway.errors import ConfigurationError
from gateway.settings.checks import (
    _between,
    _did_you_mean,
    _explain,
    _MemoryBytes,
    _must,
    _unknown_key,
)
from gateway.yamlfile import read_yaml, shown

ENV_PREFIX = "GATEWAY_"

# Variables (NAME=value) with our prefix that are no settings: setup.py's, the store's secret, what the
# commands ask the admin port with, and a trap. Kubernetes gives
# every container variables for every Service of its namespace. For one called "gateway" they begin
# with our prefix, and GATEWAY_PORT=tcp://10.0.0.1:8000 even has the name of a setting, as has
# GATEWAY_METRICS_PORT for "gateway-metrics". Read as settings they would end the start of every pod.
_NOT_SETTINGS = re.compile(
    r"GATEWAY_(CYTHON_DEBUG|SECRET|ADMIN_URL|API_KEY)="
    r"|GATEWAY_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?)="
    r"|GATEWAY_(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?="
    r"|GATEWAY_(\w+_)?PORT=(tcp|udp|sctp)://",
    re.ASCII,
)

_is_host = re.compile(r"[0-9A-Za-z_.:%-]{1,255}").fullmatch
_is_http_url = re.compile(r"https?://[0-9A-Za-z_.:%\[\]-]{1,255}(/[!-~]{0,500})?").fullmatch
_is_state_url = re.compile(r"(sqlite:///|postgresql://)[!-~]{1,1000}").fullmatch
_STATE_URLS = "sqlite:///PATH or postgresql://…"
_split = BeforeValidator(  # an environment variable is text
    lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value
)
_is_few = _must(lambda entries: len(entries) <= 16, "a list of at most 16 entries")
# An empty variable or key would otherwise mean the working directory.
_is_path = _must(lambda value: isinstance(value, str | Path) and value != "", "a path")
_FilePath = Annotated[Path, BeforeValidator(_is_path)]
_is_secret = _must(
    lambda value: isinstance(value, SecretStr | str) and len(value) >= 16,
    "text of at least 16 characters",
)


class ServerSettings(BaseSettings, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Settings of the whole server. Made by `load_server_settings`, whose errors are one line."""

    config: _FilePath | None = None
    """The YAML file that the other keys are read from; not a key of that file."""
    model_repository: _FilePath
    """The folder of models; no file outside it is ever served."""
    host: Annotated[str, AfterValidator(_must(_is_host, "an address or a host name"))] = "127.0.0.1"
    """Address the data port listens on; 0.0.0.0 opens it to others."""
    port: Annotated[int, _between(0, 65535)] = 8000
    """Data port: inference, health; 0: any free port."""
    metrics_host: Annotated[str, AfterValidator(_must(_is_host, "an address or a host name"))] = (
        "127.0.0.1"
    )
    """Address the metrics port listens on."""
    metrics_port: Annotated[int, _between(0, 65535)] = 8002
    """Port of /metrics for Prometheus; 0: any free port."""
    admin_host: Annotated[str, AfterValidator(_must(_is_host, "an address or a host name"))] = (
        "127.0.0.1"
    )
    """Address the admin port listens on; beyond loopback an API key must exist."""
    admin_port: Annotated[int, _between(0, 65535)] = 8081
    """Admin port: versions, rollouts, events, dashboard; 0: any free port."""
    state: Annotated[str, AfterValidator(_must(_is_state_url, _STATE_URLS))] | None = None
    """Database of routes, rollouts, events and keys; null: .gateway/state.db in the model repository."""
    model_roots: Annotated[tuple[_FilePath, ...], _split, AfterValidator(_is_few)] = ()
    """Folders beside the repository that versions may be registered from; in text, with commas."""
    max_artifact_bytes: Annotated[int, _between(1 << 10, 1 << 40)] = 2 << 30
    """Most bytes of a version that is registered: of the body, or of the file or folder of a source."""
    watch_repository: bool = False
    """Whether new versions in the model repository are served as they appear."""
    data_keys: bool = False
    """Whether the data port asks inference requests for an API key."""
    prometheus_url: Annotated[str, AfterValidator(_must(_is_http_url, "an http(s) URL"))] | None = (
        None
    )
    """Prometheus server that rollouts may ask queries of; null: such metrics are refused."""
    webhook_hosts: Annotated[
        tuple[Annotated[str, AfterValidator(_must(_is_host, "a host name"))], ...],
        _split,
        AfterValidator(_is_few),
    ] = ()
    """Hosts that gates of rollouts may call, in text with commas; a gate with another host is refused."""
    webhook_secret: Annotated[SecretStr, BeforeValidator(_is_secret)] | None = None
    """Key of the signature (HMAC-SHA256) that calls of gates carry; null: they are not signed."""
    frontends: Annotated[int, _between(1, 64)] = 1
    """Processes that share the data port, each with queues and slots of its own."""
    strict_readiness: bool = False
    """Whether a failed model without a ready version makes the server unready."""
    exit_on_error: bool = True
    """Whether a version that cannot be loaded at start ends the start."""
    orphan_grace_s: Annotated[float, _between(0, 3600, "a number")] = 30.0
    """Time that requests are still served after the supervisor has died."""
    drain_pause_s: Annotated[float, _between(0, 600, "a number")] = 0.0
    """Time between turning unready and closing the listeners, at shutdown."""
    drain_timeout_s: Annotated[float, _between(0, 3600, "a number")] = 30.0
    """Time that requests in flight get to finish, at shutdown."""
    load_timeout_s: Annotated[float, _between(1, 86_400, "a number")] = 120.0
    """Time that a version gets to load and warm up before it counts as failed."""
    max_request_bytes: Annotated[int, _between(1 << 10, 1 << 32)] = 64 << 20
    """Longest request body, as sent and decompressed; beyond it 413."""
    max_answer_bytes: Annotated[int, _between(1 << 20, 1 << 36)] = 256 << 20
    """Most bytes of the outputs of a run that do not fit a slot of shared memory; beyond it 500."""
    max_header_bytes: Annotated[int, _between(1 << 10, 1 << 20)] = 16 << 10
    """Longest request line, and longest header; not their sum."""
    keepalive_timeout_s: Annotated[float, _between(1, 3600, "a number")] = 75.0
    """Time that an idle connection is kept open."""
    fast_lane: bool = True
    """Whether plain inference requests are served without aiohttp; off, to compare the two."""
    lane_bytes: Annotated[int, _between(1 << 20, 1 << 36)] = 64 << 20
    """Budget of a lane's inputs, and of its outputs: one row must fit, and 8 slots are the least."""
    memory_bytes: _MemoryBytes | None = None
    """Memory of all workers together; a load beyond it is refused; null: all that there is."""
    model_control: bool = False
    """Whether clients of the data port may load and unload models (v2 repository calls)."""
    cache_folder: _FilePath | None = None
    """Folder of optimised graphs; null: .gateway/cache in the model repository."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important log line that is written."""
    log_format: Literal["text", "json"] = "text"
    """Form of a log line: text for people, json for machines."""

    @model_validator(mode="after")
    def _lane_holds_the_largest_request(self) -> ServerSettings:
        if self.lane_bytes < self.max_request_bytes:
            raise ValueError("lane_bytes must be at least max_request_bytes: rows share a slot")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then file. ConfigurationError for an unknown key in either."""
        environment = _from_environment(os.environ)
        config = init_settings().get("config", environment.get("config"))
        return (
            init_settings,
            InitSettingsSource(settings_cls, environment),
            InitSettingsSource(settings_cls, _from_file(config)),
        )


def load_server_settings(**flags: Any) -> ServerSettings:
    """Reads the server's settings; a flag that is None was not given.

    Raises:
        ConfigurationError: one line that names the key, variable or file and what it must be.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    # Also keeps out BaseSettings' own switches (_env_file, …), which are not settings.
    if problem := _unknown_key(given, ServerSettings.model_fields):
        raise ConfigurationError(problem)
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None


def _variable(field: str) -> str:
    return ENV_PREFIX + field.upper()


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings among the variables. ConfigurationError for one with our prefix that is none."""
    fields = {_variable(field): field for field in ServerSettings.model_fields}
    found = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or _NOT_SETTINGS.match(f"{name}={value}"):
            continue
        if name not in fields:
            # Compared without the prefix: sharing that much would make any name look alike.
            hint = _did_you_mean(name.removeprefix(ENV_PREFIX), fields.values(), _variable)
            raise ConfigurationError(f"unknown environment variable {shown(name)}{hint}")
        found[fields[name]] = value
    return found


def _from_file(config: Any) -> dict[str, Any]:
    """The settings in the YAML file, none without one. ConfigurationError for an unknown key."""
    if not isinstance(config, str | Path) or config == "":
        return {}  # not given, or refused by the model itself
    where = f"settings file {shown(str(config))}"
    content = read_yaml(Path(config), where)
    if problem := _unknown_key(content, ServerSettings.model_fields.keys() - {"config"}):
        raise ConfigurationError(f"{where}: {problem}")
    return content
