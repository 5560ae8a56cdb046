"""What the project wants to meet: ratios and differences, each taken within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from report import spread

from peers.results import BARE, Case, Key, Results, Sample, counted

OURS = "gateway"
HELD = "gateway-held"


@dataclass(frozen=True)
class Target:
    """A limit on a figure.

    Attributes:
        text: what is compared, without the limit.
        subjects: whose samples the figure is made of, in this order.
        figure: of these samples of one round.
        limit: for the median of the rounds.
        at_least: whether the limit is a lower one.
        unit: of figure and limit.
    """

    text: str
    subjects: tuple[Key, ...]
    figure: Callable[[Sequence[Sample]], float]
    limit: float
    at_least: bool = False
    unit: str = "×"

    def judge(self, results: Results) -> Judgement:
        """Whether it was met."""
        words = (
            f"{self.text} {'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}"
        )
        rounds, quiet = counted(results.together(self.subjects))
        if not rounds:
            return Judgement(words, None, "not measured", quiet)
        figures = [self.figure(samples) for samples in rounds]
        median = statistics.median(figures)
        met = median >= self.limit if self.at_least else median <= self.limit
        return Judgement(words, met, f"{spread(figures, 2)} {self.unit}", quiet)


@dataclass(frozen=True)
class Judgement:
    """A target in words, whether it was met (None: not measured), the figure, whether it was quiet."""

    text: str
    met: bool | None
    measured: str
    quiet: bool


def cpu_ratio(samples: Sequence[Sample]) -> float:
    """The first's CPU time a request over the second's."""
    return samples[0].cpu_us / samples[1].cpu_us


def rate_ratio(samples: Sequence[Sample]) -> float:
    """The first's answers a second over the second's."""
    return samples[0].rate / samples[1].rate


def latency_beyond(samples: Sequence[Sample]) -> float:
    """The first's p50 beyond that of the others together, in ms."""
    return samples[0].p50_ms - sum(sample.p50_ms for sample in samples[1:])


def cpu_beyond_model(samples: Sequence[Sample]) -> float:
    """The first's CPU time a request, without that of the model (the third), over the second's."""
    return (samples[0].cpu_us - samples[2].cpu_us) / samples[1].cpu_us


def _keys(case: Case, *subjects: str) -> tuple[Key, ...]:
    return tuple(Key(case, subject) for subject in subjects)


_ONE, _MLP16, _MANY = (Case("mlp16-binary", n) for n in (1, 32, 128))
_BINARY, _JSON, _MSGPACK = (Case(f"mlp784-{form}", 32) for form in ("binary", "json", "msgpack"))
_ENCODER, _IMAGE = Case("encoder-binary", 64), Case("image-binary", 32)


def _loop(case: Case) -> Key:
    """The bare loop that took turns with the servers of a case."""
    return Key(Case(case.workload, 0), BARE)


TARGETS = (
    Target(
        "mlp16 binary, 32 conn.: CPU a request over nginx's static 200,",
        _keys(_MLP16, OURS, "nginx"),
        cpu_ratio,
        2.0,
    ),
    Target(
        "the same over Triton's GET /v2/health/live,",
        _keys(_MLP16, OURS, "pytriton-probe"),
        cpu_ratio,
        1.0,
    ),
    Target(
        "mlp16 binary, 32 conn.: requests/s over Mosec's,",
        _keys(_MLP16, OURS, "mosec"),
        rate_ratio,
        4.0,
        at_least=True,
    ),
    Target(
        "mlp16 binary, 128 conn.: requests/s over Mosec's,",
        _keys(_MANY, OURS, "mosec"),
        rate_ratio,
        2.0,
        at_least=True,
    ),
    Target(
        "mlp16 binary, 1 conn.: p50 beyond nginx's p50 and the model's own run,",
        (*_keys(_ONE, OURS, "nginx"), _loop(_ONE)),
        latency_beyond,
        0.08,
        unit="ms",
    ),
    Target(
        "mlp784 JSON of 8 kB, 32 conn.: CPU a request over Mosec's,",
        _keys(_JSON, OURS, "mosec"),
        cpu_ratio,
        0.2,
    ),
    Target(
        "mlp784 binary, 32 conn., the same window: CPU a request over Mosec's,",
        _keys(_BINARY, HELD, "mosec"),
        cpu_ratio,
        0.6,
    ),
    Target(
        "mlp784 msgpack, 32 conn., the same window: CPU a request over Mosec's,",
        _keys(_MSGPACK, HELD, "mosec"),
        cpu_ratio,
        0.6,
    ),
    Target(
        "encoder, 64 conn.: rows/s over bare ONNX Runtime's best,",
        (Key(_ENCODER, OURS), _loop(_ENCODER)),
        rate_ratio,
        0.97,
        at_least=True,
    ),
    Target(
        "image, 32 conn.: CPU a request, without the model's own, over a recv_into sink's,",
        (*_keys(_IMAGE, OURS, "sink"), _loop(_IMAGE)),
        cpu_beyond_model,
        2.0,
    ),
    Target(
        "image, 32 conn.: CPU a request over the aiohttp batcher's,",
        _keys(_IMAGE, OURS, "aiohttp"),
        cpu_ratio,
        0.5,
    ),
)
