"""Which version answers: the front end's table of models, versions, labels and routes."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gateway._kernels.ledger import RequestCounters
from gateway.errors import InvalidRequest, NotFound, Unavailable
from gateway.names import MAX_VERSION, NAME
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.routing import Caller, ModelRoute, Shadow, Share
from gateway.telemetry.metrics import VersionMetrics
from gateway.tensors import Signature

_DIGITS = re.compile(r"[0-9]{1,19}")


class VersionState(enum.Enum):
    """Life of a version, as clients may see it. The supervisor decides; front ends are told."""

    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"  # what it has in flight is finished, and nothing new is taken
    UNLOADED = "UNLOADED"


@dataclass(slots=True)
class Version:
    """One version of a model, as a front end knows it.

    ``signature`` and ``dispatcher`` are there from READY on; ``config`` is what the configuration
    document shows, and ``begun`` counts the requests of the aiohttp lane whose head has been read.
    """

    model: str
    number: int
    metrics: VersionMetrics
    state: VersionState = VersionState.LOADING
    reason: str = ""
    signature: Signature | None = None
    dispatcher: Dispatcher | None = None
    config: dict[str, Any] = field(default_factory=dict)
    begun: int = 0

    @property
    def in_flight(self) -> int:
        """What an unload waits for: 0 when no request is being read, waits, runs or is answered."""
        intake = self.dispatcher.intake if self.dispatcher is not None else None
        return self.begun + (intake.in_flight + intake.receiving if intake is not None else 0)

    @property
    def is_ready(self) -> bool:
        """READY, with a worker alive to run it."""
        return (
            self.state is VersionState.READY
            and self.dispatcher is not None
            and self.dispatcher.has_workers
        )

    def ready(self) -> Signature:
        """What it takes and gives. Unavailable when it is not READY."""
        if self.state is not VersionState.READY or not self.signature or not self.dispatcher:
            raise self.refusal()
        return self.signature

    def begin_request(self) -> Signature:
        """A request's head is here: an unload waits until `end_request`. Unavailable when not READY."""
        signature = self.ready()
        self.begun += 1
        return signature

    def end_request(self) -> None:
        """A request that was begun has its answer."""
        self.begun -= 1

    def refusal(self) -> Unavailable:
        """What a request is told that the version cannot take in its state."""
        return Unavailable(
            f"model '{self.model}' version {self.number} is {self.state.value.lower()}"
        )


class Target(NamedTuple):
    """A version that gets a copy of a request, and how its outputs are compared."""

    version: Version
    rule: Shadow


class Choice(NamedTuple):
    """Who answers one request.

    Attributes:
        version: it does.
        is_slice: it is counted in the version's slice.
        shadow: gets a copy; None: nobody.
    """

    version: Version
    is_slice: bool = False
    shadow: Target | None = None

    @property
    def counters(self) -> RequestCounters:
        """Where its answer is counted."""
        metrics = self.version.metrics
        return metrics.slice_counters if self.is_slice else metrics.counters


def checked_name(model: str) -> str:
    """A model's name as it came. InvalidRequest for one outside its grammar."""
    if not NAME.fullmatch(model):
        raise InvalidRequest(f"a model's name must match {NAME.pattern}")
    return model


class RouteTable:
    """Models by name, their versions by number, and who answers a request that names no version.

    ``routes`` and ``labels`` are by model. ``is_started`` says whether every version of the server's start
    has loaded or failed.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[int, Version]] = {}
        self.routes: dict[str, ModelRoute] = {}
        self.labels: dict[str, Mapping[str, int]] = {}
        self.is_started = False

    def direct(self, name: str, route: ModelRoute | None, labels: Mapping[str, int]) -> None:
        """Set a model's route, or that it has none, and its labels."""
        self.routes.pop(name, None)
        self.labels.pop(name, None)
        if route is not None:
            self.routes[name] = route
        if labels:
            self.labels[name] = labels

    def forget(self, name: str, number: int) -> None:
        """The version is unloaded, and its files are gone."""
        versions = self.models.get(name, {})
        versions.pop(number, None)
        if not versions:
            self.models.pop(name, None)

    def versions(self) -> Iterator[Version]:
        """Every version of every model."""
        for versions in self.models.values():
            yield from versions.values()

    def in_flight(self) -> int:
        """Requests that have begun and have no answer yet, those whose body is read among them."""
        return sum(version.in_flight for version in self.versions())

    def model(self, name: str) -> dict[int, Version]:
        """A model's versions. InvalidRequest for a name outside its grammar, NotFound."""
        versions = self.models.get(checked_name(name))
        if versions is None:
            raise NotFound(f"unknown model '{name}'")
        return versions

    def resolve(self, name: str, version: str | None = None, label: str | None = None) -> Version:
        """The version that is meant: by number, by label, else the one that stands for the model.

        Raises:
            InvalidRequest: a malformed name or version, or version and label together.
            NotFound: unknown model, version or label.
            Unavailable: the model has no version that could answer.
        """
        versions = self.model(name)
        if label is not None:
            if version is not None:
                raise InvalidRequest("name a version or a label, not both")
            number = self._labelled(name, label)
        elif version is None:
            return _main(name, versions, self.routes.get(name))
        elif not _DIGITS.fullmatch(version) or int(version) > MAX_VERSION:
            raise InvalidRequest("a version is a whole number of at most 63 bits")
        else:
            number = int(version)
        found = versions.get(number)
        if found is None:
            raise NotFound(f"model '{name}' has no version {number}")
        return found

    def choose(self, name: str, version: str | None, label: str | None, caller: Caller) -> Choice:
        """Who answers an inference: the version that it names, else whom the model's route chooses.

        A version that cannot answer here is stood in for by the model's main one: an answer is worth more
        than the same version's.

        Args:
            name: of the model.
            version: that the request names, as it came.
            label: likewise.
            caller: asked for what the route goes by.

        Raises:
            InvalidRequest, NotFound, Unavailable: as `resolve`.
        """
        route = self.routes.get(name)
        if route is None or version is not None or label is not None:
            return Choice(self.resolve(name, version, label))
        versions = self.model(name)
        share = route.choose(caller)
        chosen = versions.get(share.version)
        if share.version != route.main and (chosen is None or not chosen.is_ready):
            chosen, share = None, Share(route.main, 0)
        return Choice(
            chosen or _main(name, versions, route),
            share.is_slice,
            _copied_to(route, share, versions),
        )

    def _labelled(self, name: str, label: str) -> int:
        """The number of the version that a label is on."""
        if not NAME.fullmatch(label):
            raise InvalidRequest(f"a label must match {NAME.pattern}")
        number = self.labels.get(name, {}).get(label)
        if number is None:
            raise NotFound(f"model '{name}' has no label '{label}'")
        return number

    def is_ready(self, strict: bool) -> bool:
        """Whether every route leads to a version that answers; a canary's failure is not the server's.

        A model that is loaded or unloaded at run time does not count while it has no route: the others
        are served meanwhile.

        Args:
            strict: a model with a failed version and none that is READY counts as unready, too.
        """
        mains = ((self.models.get(name, {}), route.main) for name, route in self.routes.items())
        if any(main not in versions or not versions[main].is_ready for versions, main in mains):
            return False
        unrouted = (vs for name, vs in self.models.items() if name not in self.routes)
        return not any(self._is_missed(versions.values(), strict) for versions in unrouted)

    def _is_missed(self, versions: Iterable[Version], strict: bool) -> bool:
        """Whether a model without a route makes the server unready."""
        states = {version.state for version in versions}
        if not self.is_started:
            return strict or states != {VersionState.FAILED}
        # READY beside FAILED: a route that stays on its version, which has failed.
        return VersionState.FAILED in states and (strict or VersionState.READY in states)


def _main(name: str, versions: Mapping[int, Version], route: ModelRoute | None) -> Version:
    """The version that stands for a model. Unavailable where there is none."""
    main = versions.get(route.main) if route is not None else None
    if main is None:
        raise Unavailable(f"no version of model '{name}' can answer")
    return main


def _copied_to(route: ModelRoute, share: Share, versions: Mapping[int, Version]) -> Target | None:
    """Who gets a copy of a request that this share answers."""
    if route.shadow is None or not route.is_copied(share):
        return None
    version = versions.get(route.shadow.version)
    return None if version is None else Target(version, route.shadow)
