"""The settings of a model: what its ``config.yaml`` may say.

The line under each field is its description; ``docs/models.md`` repeats it and a test compares.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ValidationError,
    model_validator,
)

from gateway.errors import ConfigurationError
from gateway.names import MAX_VERSION
from gateway.settings.checks import _between, _explain, _MemoryBytes, _must, _unknown_key
from gateway.yamlfile import read_yaml, shown

# A provider that has a short form has no second name: not CPUExecutionProvider beside cpu.
_is_device = re.compile(
    r"cpu|cuda:(0|[1-9]\d?)|(?!(CPU|CUDA)Exec)[A-Za-z0-9]{1,64}ExecutionProvider", re.ASCII
).fullmatch
_DEVICES = "'cpu', 'cuda:N' or the name of another ONNX Runtime execution provider"
_is_samples_file = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\.npz").fullmatch

_is_few = _must(lambda entries: 1 <= len(entries) <= 16, "a list of 1 to 16 entries")
_is_ascending = _must(
    lambda sizes: len(sizes) <= 256 and all(a < b for a, b in itertools.pairwise(sizes)),
    "a list of at most 256 numbers, each above the one before it",
)
_Version = Annotated[int, _between(1, MAX_VERSION)]
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
    cuda_graphs: bool = False
    """Whether a GPU replays what it did for each of allowed_batch_sizes instead of being told anew."""

    @model_validator(mode="after")
    def _graphs_are_cudas(self) -> Instance:
        if self.cuda_graphs and not self.device.startswith("cuda:"):
            raise ValueError(f"cuda_graphs must be false where device is {self.device}")
        return self


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
    slo_ms: Annotated[float, _between(1, 3_600_000, "a number")] | None = None
    """Time from arrival to answer for which an idle worker may hold back rows; null: no such target."""
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
    """Whether a worker runs every padded size on made-up inputs before it takes requests."""
    warmup_samples: (
        Annotated[str, AfterValidator(_must(_is_samples_file, "the name of an .npz file"))] | None
    ) = None
    """The .npz file beside config.yaml whose arrays, named as the inputs, are run instead."""
    memory_bytes: _MemoryBytes | None = None
    """Memory that each worker may take; loading fails beyond; null: no limit of the model's own."""
    session_options: SessionOptions = SessionOptions()
    """How ONNX Runtime runs the model."""
    cache_optimized: bool = True
    """Whether optimised graphs, of models of 1 MiB to 1 GiB in one file, are kept for faster loads."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> ModelSettings:
        largest = self.allowed_batch_sizes[-1] if self.allowed_batch_sizes else None
        if largest is None and any(instance.cuda_graphs for instance in self.instances):
            raise ValueError("allowed_batch_sizes must be given where cuda_graphs is true")
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
