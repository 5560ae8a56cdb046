"""The settings of the server and of each model, and the one line that says what is wrong with them.

A server setting comes from the first of these that has it: flag, environment (``GATEWAY_PORT`` is
``port``), YAML file, default. A model's come from its ``config.yaml``. A key that nobody knows is
refused by name wherever it stands: a misspelt limit that is silently ignored is found in production.
The line under each field is its description; ``docs/settings.md`` repeats it and a test compares.

The environment is read here and not by pydantic-settings' own source, which ignores the variables
that it does not know and matches names in any case.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from gateway.errors import ConfigurationError
from gateway.names import MAX_VERSION
from gateway.yamlfile import read_yaml, shown

ENV_PREFIX = "GATEWAY_"

# Variables (NAME=value) with our prefix that are no settings: setup.py's, and a trap. Kubernetes gives
# every container variables for every Service of its namespace. For one called "gateway" they begin
# with our prefix, and GATEWAY_PORT=tcp://10.0.0.1:8000 even has the name of a setting, as has
# GATEWAY_METRICS_PORT for "gateway-metrics". Read as settings they would end the start of every pod.
_NOT_SETTINGS = re.compile(
    r"GATEWAY_CYTHON_DEBUG="
    r"|GATEWAY_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?)="
    r"|GATEWAY_(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?="
    r"|GATEWAY_(\w+_)?PORT=(tcp|udp|sctp)://",
    re.ASCII,
)


def _unknown_key(keys: Collection[object], known: Collection[str]) -> str | None:
    """Names the first key that is not known, and the one that was probably meant."""
    for key in keys:
        if key not in known:
            return f"unknown key {shown(key)}{_did_you_mean(key, known)}"
    return None


def _did_you_mean(key: object, known: Collection[str], spell: Callable[[str], str] = str) -> str:
    name = key.lower().replace("-", "_") if isinstance(key, str) else ""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {spell(close[0])!r}?)" if close else ""


def _between(low: int, high: int, kind: str = "a whole number") -> WrapValidator:
    """A number from ``low`` to ``high``. Refuses NaN, and YAML's true, which Python takes for 1."""

    def check(value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        try:
            number = None if isinstance(value, bool) else parse(value)
        except ValidationError:
            number = None
        if number is None:
            raise ValueError(f"must be {kind} between {low} and {high}, got {shown(value)}")
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}, got {shown(number)}")
        return number

    return WrapValidator(check)


def _must(hold: Callable[[Any], object], expected: str) -> Callable[[Any], Any]:
    """Refuses a value for which ``hold`` is false, saying in words what was ``expected``."""

    def check(value: Any) -> Any:
        if not hold(value):
            raise ValueError(f"must be {expected}, got {shown(value)}")
        return value

    return check


# A provider that has a short form has no second name: not CPUExecutionProvider beside cpu.
_is_device = re.compile(
    r"cpu|cuda:(0|[1-9]\d?)|(?!(CPU|CUDA)Exec)[A-Za-z0-9]{1,64}ExecutionProvider", re.ASCII
).fullmatch
_DEVICES = "'cpu', 'cuda:N' or the name of another ONNX Runtime execution provider"
_is_samples_file = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\.npz").fullmatch
_is_host = re.compile(r"[0-9A-Za-z_.:%-]{1,255}").fullmatch

_is_few = _must(lambda entries: 1 <= len(entries) <= 16, "a list of 1 to 16 entries")
_is_ascending = _must(
    lambda sizes: len(sizes) <= 256 and all(a < b for a, b in itertools.pairwise(sizes)),
    "a list of at most 256 numbers, each above the one before it",
)
_Version = Annotated[int, _between(1, MAX_VERSION)]
# An empty variable or key would otherwise mean the working directory.
_is_path = _must(lambda value: isinstance(value, str | Path) and value != "", "a path")
_FilePath = Annotated[Path, BeforeValidator(_is_path)]
_MemoryBytes = Annotated[int, _between(1 << 20, 1 << 50)]
_CPU_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)


def _is_cpus(text: str) -> bool:
    """Whether `gateway.serving.cpus.parse_cpus`, which the worker has, takes this; a test compares."""
    ranges = [_CPU_RANGE.fullmatch(piece) for piece in text.split(",")]
    return all(r is not None and (r[2] is None or int(r[1]) <= int(r[2])) for r in ranges)


def _is_plain_int(value: object) -> bool:
    """Whether it is a whole number that a message can hold; YAML's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 64


_is_cpu_list = _must(_is_cpus, "a list of CPUs such as 0-3,8")
_Cpus = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if _is_plain_int(value) else value),
    AfterValidator(_is_cpu_list),
]
_is_number = _must(lambda value: isinstance(value, float) or _is_plain_int(value), "a number")
# Names that others made up, of tensors, dims and options; what is longer is no name.
_is_name = _must(
    lambda key: isinstance(key, str) and 1 <= len(key) <= 256 and key.isprintable(),
    "a printable name of 1 to 256 characters",
)


def _read_names(value: Any) -> Any:
    """Refuses a key that is no name before its value is looked at: errors repeat keys as they are."""
    if isinstance(value, Mapping):
        for key in value:
            try:
                _is_name(key)
            except ValueError as error:
                raise ValueError(f"a key {error}") from None
    return value


_is_option = _must(
    lambda value: isinstance(value, str) and len(value) <= 4096 and "\0" not in value,
    "text of at most 4096 characters, a number, true or false",
)


def _read_option(value: Any) -> Any:
    """The text by which ONNX Runtime takes an option's value."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if _is_plain_int(value) or isinstance(value, float):
        return str(value)
    return _is_option(value)


_Options = Annotated[
    dict[str, Annotated[str, BeforeValidator(_read_option)]], BeforeValidator(_read_names)
]


class _Section(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A mapping of a model's settings file: fixed once read, closed to keys it does not know."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        # Before pydantic's own check, which does not name the key that was probably meant.
        if isinstance(data, Mapping) and (problem := _unknown_key(data, cls.model_fields)):
            raise ValueError(problem)
        return data


class Instance(_Section):
    """Worker processes of one kind."""

    device: Annotated[str, AfterValidator(_must(_is_device, _DEVICES))] = "cpu"
    """Where workers run the model: cpu, cuda:N for GPU number N, or an execution provider's name."""
    provider_options: _Options = {}
    """Options of ONNX Runtime's execution provider, passed on as text; true is 1, false 0."""
    count: Annotated[int, _between(1, 128)] = 1
    """Worker processes of this kind; bounds the batches run at the same time."""
    threads: Annotated[int, _between(1, 1024)] | None = None
    """ONNX Runtime threads in each worker; null: usable CPUs, shared by the model's CPU workers."""
    cpus: _Cpus | None = None
    """The CPUs that each worker may run on, a list such as 0-3,8; null: all."""


class Queue(_Section):
    """What happens to requests that no worker can take yet."""

    max_size: Annotated[int, _between(1, 1_000_000)] = 4096
    """Requests that may wait for the model; beyond it they are refused (429)."""
    timeout_ms: Annotated[int, _between(0, 86_400_000)] = 0
    """Time that a request may wait in the queue before it fails (504); 0: no end."""
    priority_levels: Annotated[int, _between(0, 64)] = 0
    """Levels that a request's priority may name, 1 first; 0: priorities are ignored."""
    default_priority_level: Annotated[int, _between(1, 64)] | None = None
    """The level of requests that name none; null: the middle one."""

    @model_validator(mode="after")
    def _default_is_a_level(self) -> Queue:
        if (self.default_priority_level or 0) > self.priority_levels:
            raise ValueError(
                f"default_priority_level must be at most priority_levels ({self.priority_levels}), "
                f"got {self.default_priority_level}"
            )
        return self

    @property
    def default_level(self) -> int:
        """The level of requests that name none; 0 where there are no levels."""
        return self.default_priority_level or (self.priority_levels + 1) // 2


class DimPadding(_Section):
    """How requests are padded in one symbolic dim of the inputs."""

    buckets: Annotated[
        tuple[Annotated[int, _between(1, 1 << 31)], ...],
        AfterValidator(_must(len, "a list of one length or more")),
        AfterValidator(_is_ascending),
    ]
    """The lengths that the dim is padded to, ascending; a longer request keeps its own."""
    side: Literal["right", "left"] = "right"
    """Whether the padding goes behind the data (right) or in front of it (left)."""
    values: Annotated[
        dict[str, Annotated[int | float, BeforeValidator(_is_number)]], BeforeValidator(_read_names)
    ] = {}
    """What each input is padded with, by its name; 0 for the inputs that are not named."""


class SessionOptions(_Section):
    """How ONNX Runtime runs the model."""

    execution_mode: Literal["sequential", "parallel"] = "sequential"
    """Whether branches of the graph run one after the other or at the same time."""
    inter_op_threads: Annotated[int, _between(1, 1024)] = 1
    """Threads that run branches of the graph; of use where execution_mode is parallel."""
    graph_optimization: Literal["all", "extended", "basic", "disabled"] = "all"
    """How far the graph is rewritten at load to run faster."""
    memory_pattern: bool = True
    """Whether memory is planned at the first run of a shape, for the next ones."""
    cpu_arena: bool = True
    """Whether CPU memory is kept between runs instead of given back."""
    config: _Options = {}
    """Session configuration entries of ONNX Runtime, passed on as text; true is 1, false 0."""


class Latest(_Section):
    """The version policy that serves the newest versions."""

    latest: _Version
    """How many versions are served, counted from the highest down."""


class Specific(_Section):
    """The version policy that serves the named versions and no other."""

    specific: Annotated[
        tuple[_Version, ...], AfterValidator(_must(len, "a list of one version or more"))
    ]
    """The versions that are served; each must be in the repository."""


def _read_version_policy(value: Any) -> Any:
    """Picks the policy by its key, so that an error names the key and not every alternative."""
    if isinstance(value, Latest | Specific) or value == "all":
        return value
    if isinstance(value, Mapping):
        if problem := _unknown_key(value, ("latest", "specific")):
            raise ValueError(problem)
        if len(value) == 1:
            return (Latest if "latest" in value else Specific).model_validate(value)
    raise ValueError(f"must be {{latest: N}}, {{specific: [N, …]}} or all, got {shown(value)}")


VersionPolicy = Annotated[Latest | Specific | Literal["all"], BeforeValidator(_read_version_policy)]
Promote = Literal["latest", "manual"]


class ModelSettings(_Section):
    """What ``<repository>/<model>/config.yaml`` may say."""

    max_batch_size: Annotated[int, _between(0, 4096)] | None = None
    """Rows that one batch may hold; 0: one request at a time; null: decided from the graph."""
    allowed_batch_sizes: Annotated[
        tuple[Annotated[int, _between(1, 4096)], ...], AfterValidator(_is_ascending)
    ] = ()
    """Numbers of rows that batches are padded to, ascending; the last is max_batch_size."""
    accept_batch_effects: bool = False
    """Whether rows may share a batch although a test at load found that it changes their answers."""
    padding: Annotated[dict[str, DimPadding], BeforeValidator(_read_names)] = {}
    """How inputs of unlike lengths are padded to share a batch, by symbolic dim."""
    max_queue_delay_us: Annotated[int, _between(0, 60_000_000)] = 0
    """Time that an idle worker may hold a batch back for more rows; 0: never."""
    instances: Annotated[tuple[Instance, ...], AfterValidator(_is_few)] = (Instance(),)
    """The worker processes of each served version, by kind."""
    queue: Queue = Queue()
    """What happens to requests that no worker can take yet."""
    version_policy: VersionPolicy = Latest(latest=1)
    """Which versions are served: {latest: N}, {specific: [N, …]} or all."""
    promote: Promote = "latest"
    """Whether the default route follows the newest version or is moved by hand."""
    execution_timeout_ms: Annotated[int, _between(1, 86_400_000)] = 30_000
    """Time that one batch may run before its worker counts as hung; looked at once a second."""
    warmup: bool = True
    """Whether a worker runs the model before it takes requests: at every padded size, on zeros."""
    warmup_samples: (
        Annotated[str, AfterValidator(_must(_is_samples_file, "the name of an .npz file"))] | None
    ) = None
    """The .npz file beside config.yaml whose arrays, named as the inputs, are run instead of zeros."""
    memory_bytes: _MemoryBytes | None = None
    """Memory that each worker may take; loading fails beyond; null: no limit of the model's own."""
    session_options: SessionOptions = SessionOptions()
    """How ONNX Runtime runs the model."""
    cache_optimized: bool = True
    """Whether the optimised graph is kept on disk, for a faster next load."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> ModelSettings:
        largest = self.allowed_batch_sizes[-1] if self.allowed_batch_sizes else None
        if largest is not None and self.max_batch_size == 0:
            raise ValueError("allowed_batch_sizes must be empty where max_batch_size is 0")
        if largest is not None and self.max_batch_size not in (None, largest):
            raise ValueError(
                f"allowed_batch_sizes must end with max_batch_size ({self.max_batch_size}), "
                f"got {largest}"
            )
        return self


def load_model_settings(path: Path) -> ModelSettings:
    """Reads ``<repository>/<model>/config.yaml``.

    Raises:
        ConfigurationError: one line that names the model, the key and what it must be.
    """
    where = f"config.yaml of model {shown(path.parent.name)}"
    try:
        return ModelSettings.model_validate(read_yaml(path, where))
    except ValidationError as error:
        raise ConfigurationError(f"{where}: {_explain(error)}") from None


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
    max_header_bytes: Annotated[int, _between(1 << 10, 1 << 20)] = 16 << 10
    """Longest request line, and longest header; not their sum."""
    keepalive_timeout_s: Annotated[float, _between(1, 3600, "a number")] = 75.0
    """Time that an idle connection is kept open."""
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


_EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}
"""What pydantic's types of error expect, in words; literals bring their own."""


def _explain(error: ValidationError) -> str:
    """The first problem as one line: the dotted path of the setting and what it must be."""
    problem = error.errors(include_url=False)[0]
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "missing":
        where = "" if len(problem["loc"]) > 1 else ": set it by flag, environment or settings file"
        text = f"is required{where}"
    elif expected := context.get("expected", _EXPECTED.get(kind)):
        text = f"must be {expected}, got {shown(value)}"
    else:
        text = " ".join(problem["msg"].split())
    path = ".".join(str(step) for step in problem["loc"])
    return f"{path}: {text}" if path else text
