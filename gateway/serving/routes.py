"""Which version answers: the front end's table of models, versions and routes."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import InvalidRequest, NotFound, Unavailable
from gateway.names import MAX_VERSION, NAME
from gateway.serving.dispatcher import Dispatcher
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


def checked_name(model: str) -> str:
    """A model's name as it came. InvalidRequest for one outside its grammar."""
    if not NAME.fullmatch(model):
        raise InvalidRequest(f"a model's name must match {NAME.pattern}")
    return model


class RouteTable:
    """Models by name, their versions by number, and the version that a plain request gets.

    ``is_started`` says whether every version of the server's start has loaded or failed.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[int, Version]] = {}
        self.routes: dict[str, int] = {}
        self.is_started = False

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
        """The version that a request means: the one it names, else the model's route.

        Raises:
            InvalidRequest: a malformed name or version, or version and label together.
            NotFound: unknown model, version or label.
            Unavailable: the model has no version that could answer.
        """
        versions = self.model(name)
        if label is not None:
            if version is not None:
                raise InvalidRequest("name a version or a label, not both")
            if not NAME.fullmatch(label):
                raise InvalidRequest(f"a label must match {NAME.pattern}")
            raise NotFound(f"model '{name}' has no label '{label}'")
        if version is None:
            routed = self.routes.get(name)
            if routed is None:
                raise Unavailable(f"no version of model '{name}' can answer")
            return versions[routed]
        if not _DIGITS.fullmatch(version) or int(version) > MAX_VERSION:
            raise InvalidRequest("a version is a whole number of at most 63 bits")
        found = versions.get(int(version))
        if found is None:
            raise NotFound(f"model '{name}' has no version {int(version)}")
        return found

    def is_ready(self, strict: bool) -> bool:
        """Whether every route leads to a version that answers.

        A model that is loaded or unloaded at run time does not count while it has no route: the others
        are served meanwhile.

        Args:
            strict: a model with a failed version and none that is READY counts as unready, too.
        """
        if any(not self.models[name][number].is_ready for name, number in self.routes.items()):
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
