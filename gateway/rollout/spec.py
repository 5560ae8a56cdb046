"""What a rollout is asked to do: the body of ``POST /admin/v1/models/{m}/rollouts``.

Unknown fields are refused by name; every default is here.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from gateway.names import MAX_VERSION
from gateway.serving.routing import BASIS_POINTS, StickyKind

MAX_STEPS = 64
MAX_METRICS = 16
MAX_PINS = 16
MAX_GATES = 8
"""Entries of a rollout's lists; they bound what each look at it costs."""

MAX_SECONDS = 31 * 86_400
"""Longest time that a rollout may be told to wait for anything: a month."""

Source = Literal["errors", "refusals", "latency", "compute", "agreement", "prometheus"]
OnNoData = Literal["hold", "fail", "pass"]

_VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
_HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")]
_HeaderValue = Annotated[str, StringConstraints(pattern=r"^[ -~]{1,256}$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_Sticky = Annotated[str, StringConstraints(pattern=r"^(header:|cookie:)[A-Za-z0-9_.-]{1,64}$|^ip$")]


class Part(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A part of a specification: closed to fields that it does not know."""


class StepSpec(Part):
    """One step: how much the canary gets, and what must have happened before the next."""

    weight_bp: Annotated[int, Field(ge=0, le=BASIS_POINTS)]
    """The canary's part of the requests, in hundredths of a percent."""
    min_duration_s: _Seconds = 0.0
    """Time that the step lasts at least."""
    min_requests: Annotated[int, Field(ge=0, le=10**9)] = 100
    """Requests (or, where weight_bp is 0, compared copies) that the canary must have answered."""
    pause: bool = False
    """Whether it then waits for somebody to resume or promote it."""
    mirror_percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """Requests answered by the stable version of which the canary gets a copy."""


class PinSpec(Part):
    """Requests with this header go to this version, whatever the weights say."""

    header: _HeaderName
    """The header's name, in any case."""
    value: _HeaderValue
    """Its value, exactly."""
    to: Literal["canary", "stable"] = "canary"
    """Which of the two."""


class StickySpec(Part):
    """Who stays on the version that answered before."""

    key: _Sticky
    """header:NAME, cookie:NAME or ip."""
    salt: Annotated[str, StringConstraints(pattern=r"^[!-~]{1,64}$")] | None = None
    """What is hashed with the key; null: the rollout's own, which no other has."""

    @property
    def kind(self) -> StickyKind:
        """Where the key is."""
        return self.key.partition(":")[0]  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """The header's or cookie's name; headers in lower case."""
        name = self.key.partition(":")[2]
        return name.lower() if self.kind == "header" else name


class MetricSpec(Part):
    """Something that the canary is judged by."""

    name: _Name
    """How it is called in verdicts and events."""
    source: Source
    """errors: answers of 500 and above; refusals: answers of 400 to 499 but 429 and 499; latency: from
    request to answer; compute: runs of as many rows; agreement: copies whose outputs agreed with the
    stable version's; prometheus: a query."""
    test: Literal["noninferiority", "inferiority"] = "noninferiority"
    """noninferiority: the step waits until it is shown that the canary is not worse by more than the
    margin. inferiority: only until it is shown that it is; min_requests of the step without that will do."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of latency and compute, the quantile that is compared."""
    margin: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    """How much worse is still good. Of errors and refusals a difference of rates (default 0.01); of
    latency and compute a part of the stable version's (default 0.1)."""
    slack_ms: Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False)] = 0.5
    """Of latency and compute, a difference that is good whatever part it is: a version with less traffic
    has colder caches, which shows where runs are short."""
    bound: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Of agreement the least rate (default 0.99); of prometheus the value that divides good from bad."""
    direction: Literal["lower", "higher"] = "lower"
    """Of prometheus, whether lower or higher is better."""
    compare: Literal["exact", "tolerance", "top1", "cosine"] = "top1"
    """Of agreement, when two outputs agree."""
    tolerance: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 1e-3
    """Of agreement by tolerance or cosine."""
    query: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    """Of prometheus; {model}, {canary} and {stable} are replaced."""
    critical: bool = True
    """Whether a failed verdict rolls back; otherwise it is only an event."""
    on_no_data: OnNoData = "hold"
    """What it means that nothing was measured when the step's time is over: wait, roll back, or go on."""

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> MetricSpec:
        # By value, not by what was written: a spec that was stored names every field.
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default}
        belongs = {
            "quantile": {"latency", "compute"},
            "margin": {"errors", "refusals", "latency", "compute"},
            "slack_ms": {"latency", "compute"},
            "bound": {"agreement", "prometheus"},
            "direction": {"prometheus"},
            "compare": {"agreement"},
            "tolerance": {"agreement"},
            "query": {"prometheus"},
        }
        for field, sources in belongs.items():
            if field in given and self.source not in sources:
                raise ValueError(f"{field} says nothing about {self.source}")
        if self.source == "prometheus" and (self.query is None or self.bound is None):
            raise ValueError("prometheus needs query and bound")
        if self.source == "agreement" and not 0 <= self.limit <= 1:
            raise ValueError("bound of agreement must be between 0 and 1")
        return self

    @property
    def limit(self) -> float:
        """The margin or bound that holds."""
        match self.source:
            case "errors" | "refusals":
                return 0.01 if self.margin is None else self.margin
            case "latency" | "compute":
                return 0.1 if self.margin is None else self.margin
            case "agreement":
                return 0.99 if self.bound is None else self.bound
            case "prometheus":
                return self.bound or 0.0


class LimitsSpec(Part):
    """How much may go wrong before a rollout stops."""

    failures: Annotated[int, Field(ge=0, le=1000)] = 0
    """Failed looks of a prometheus metric in a row that are tolerated."""
    errors: Annotated[int, Field(ge=0, le=1000)] = 4
    """Looks in a row, of a query or a gate, that gave no answer before the rollout pauses."""
    inconclusive: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Looks without a verdict, after everything else of a step was met, before it pauses; null: any."""


class KillSwitchSpec(Part):
    """Rolls back at once, within a second of traffic, whatever the tests say."""

    error_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The canary's part of errors since the step's begin at which it acts."""
    min_requests: Annotated[int, Field(ge=1, le=10**6)] = 20
    """Requests of the canary before which it does not."""
    worker_deaths: Annotated[int, Field(ge=1, le=10**6)] = 10
    """Deaths of the canary's workers, in one attempt, at which it acts, too."""


class GateSpec(Part):
    """A webhook that must agree before a step ends."""

    name: _Name
    """How it is called in events."""
    url: Annotated[str, StringConstraints(pattern=r"^https?://[!-~]{1,1000}$")]
    """Called with POST; {"approved": true} in an answer of 200 lets the step end."""
    steps: Annotated[tuple[int, ...], Field(max_length=MAX_STEPS)] | None = None
    """Steps, from 0, that it guards; null: every one."""
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Time that it has to answer."""


DEFAULT_METRICS = (
    MetricSpec(name="errors", source="errors"),
    MetricSpec(name="compute", source="compute"),
)


class RolloutSpec(Part):
    """A rollout from one version to another."""

    canary: _VersionNumber
    """The new version."""
    stable: _VersionNumber | None = None
    """The version that it is to replace; null: the one that answers now."""
    steps: Annotated[tuple[StepSpec, ...], Field(min_length=1, max_length=MAX_STEPS)]
    """In their order; weights must not fall. After the last the canary is promoted."""
    match: Annotated[tuple[PinSpec, ...], Field(max_length=MAX_PINS)] = ()
    """Requests that choose for themselves."""
    sticky: StickySpec | None = None
    """Null: each request is drawn by lot."""
    baseline: Literal["stable", "equal_slice"] = "stable"
    """Whom the canary is compared with: all that the stable version answers, or as many of its requests."""
    metrics: Annotated[tuple[MetricSpec, ...], Field(max_length=MAX_METRICS)] = DEFAULT_METRICS
    """Errors and compute time unless said otherwise; an empty list: nothing but the kill-switch."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.99
    """Of the verdicts of the whole rollout together: 0.99 rolls back one equal version in a hundred."""
    skip_requests: Annotated[int, Field(ge=0, le=10**6)] = 20
    """First requests of the canary that no test looks at: caches and allocators are cold."""
    kill_switch: KillSwitchSpec | None = KillSwitchSpec()
    """Null: none."""
    limits: LimitsSpec = LimitsSpec()
    """How much may go wrong."""
    interval_s: Annotated[float, Field(ge=0.1, le=3600)] = 1.0
    """Time between two looks of queries and gates; counters are looked at four times a second."""
    progress_deadline_s: Annotated[float, Field(gt=0, le=MAX_SECONDS)] = 86_400.0
    """Time in which a step must end, pauses by hand not counted; then it rolls back."""
    abort_keep_warm_s: _Seconds = 30.0
    """Time that the canary stays loaded after a roll-back."""
    gates: Annotated[tuple[GateSpec, ...], Field(max_length=MAX_GATES)] = ()
    """Webhooks that must agree."""
    dry_run: bool = False
    """Only check it and say what it would do."""

    @model_validator(mode="after")
    def _holds_together(self) -> RolloutSpec:
        weights = [step.weight_bp for step in self.steps]
        if weights != sorted(weights):
            raise ValueError("steps: weights must not fall")
        if self.stable == self.canary:
            raise ValueError("canary and stable must be two versions")
        names = [metric.name for metric in self.metrics]
        if len(set(names)) != len(names):
            raise ValueError("metrics: two have the same name")
        agreements = {(m.compare, m.tolerance) for m in self.metrics if m.source == "agreement"}
        if len(agreements) > 1:
            raise ValueError("metrics: outputs can be compared in one way only")
        if agreements and not any(step.mirror_percent for step in self.steps):
            raise ValueError("metrics: agreement needs a step with mirror_percent")
        for step in self.steps:
            if step.weight_bp == 0 and step.mirror_percent == 0 and step.min_requests:
                raise ValueError("steps: without weight and copies min_requests is never met")
        return self

    @property
    def agreement(self) -> MetricSpec | None:
        """The metric that says how outputs are compared."""
        return next((m for m in self.metrics if m.source == "agreement"), None)


PLACEHOLDERS = re.compile(r"\{(model|canary|stable)\}")
"""What is replaced in a query."""
