"""How a model's plain requests are shared out among its versions.

A `ModelRoute` is immutable; the supervisor publishes it, and every front end decides with it alone. A
request's key falls into one of 10,000 buckets, and each version has a run of them, the canary the first:
a bucket that was the canary's stays the canary's as its weight grows, on every front end and every
gateway that knows the salt, without a table of who went where. The hash is XXH3's, 64 bits, of salt, NUL
and key. Requests without a key are spread at random.

Rejected: a cookie that remembers the version (whoever was on the canary once stays on it for good, so
that in the end everybody is) and a ring of versions (a weight that changes moves keys both ways).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any, Literal, Protocol

import xxhash

BASIS_POINTS = 10_000
"""All of a model's traffic; a weight of one is a hundredth of a percent."""

StickyKind = Literal["header", "cookie", "ip"]


class Caller(Protocol):
    """What a route may want to know of a request. Asked only where the route needs it."""

    def header(self, name: str) -> str | None:
        """The first value of a header, by its name in lower case; None where it has none."""

    def address(self) -> str:
        """Of the client, as the connection has it; not what a proxy says of it."""


@dataclass(frozen=True, slots=True)
class Share:
    """A version's part of the traffic.

    ``is_slice`` marks a part of a version that is counted by itself, so that a canary can be compared with
    as many requests as it gets.
    """

    version: int
    weight_bp: int
    is_slice: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    """Requests with this header go to this version, whatever their key. ``header`` is in lower case."""

    header: str
    value: str
    version: int


@dataclass(frozen=True, slots=True)
class Sticky:
    """Where a request's key is: a header's or a cookie's value by its name, or the client's address."""

    kind: StickyKind
    name: str = ""

    def key(self, caller: Caller) -> str | None:
        """The key of a request; None where it has none."""
        match self.kind:
            case "header":
                return caller.header(self.name)
            case "cookie":
                return _cookie(caller.header("cookie"), self.name)
            case "ip":
                return caller.address()


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that gets copies of requests, and how its outputs are compared with the primary's.

    Attributes:
        version: the version that gets them.
        share_bp: how many of the requests that other versions answer are copied.
        compare: ``exact``, ``tolerance`` (|a - b| <= tolerance·(1 + |a|) for every element), ``top1`` (the
            index of the largest element of each row) or ``cosine`` (of each row, at least 1 - tolerance).
        tolerance: see ``compare``.
    """

    version: int
    share_bp: int
    compare: str = "exact"
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """Who answers a model's plain requests.

    Attributes:
        shares: the canary's first, the stable version's last; weights sum to 10,000.
        salt: of the hash.
        sticky: where requests have their key; None: none has one.
        pins: looked at before anything else, the first that matches wins.
        shadow: who gets copies; None: nobody.
    """

    shares: tuple[Share, ...]
    salt: str = ""
    sticky: Sticky | None = None
    pins: tuple[Pin, ...] = ()
    shadow: Shadow | None = None
    _prefix: bytes = field(init=False, repr=False, compare=False, default=b"")

    def __post_init__(self) -> None:
        if not self.shares or sum(share.weight_bp for share in self.shares) != BASIS_POINTS:
            raise ValueError(f"weights must sum to {BASIS_POINTS}")
        object.__setattr__(self, "_prefix", self.salt.encode() + b"\0")

    @classmethod
    def to(cls, version: int) -> ModelRoute:
        """Everything to one version."""
        return cls((Share(version, BASIS_POINTS),))

    @property
    def is_plain(self) -> bool:
        """Whether every request goes to the one version, and to it alone."""
        return len(self.shares) == 1 and not self.pins and self.shadow is None

    @property
    def main(self) -> int:
        """The version that stands for the model: the stable one."""
        return self.shares[-1].version

    def versions(self) -> Iterator[int]:
        """Every version that a request or a copy may go to; some more than once."""
        yield from (share.version for share in self.shares)
        yield from (pin.version for pin in self.pins)
        if self.shadow is not None:
            yield self.shadow.version

    def choose(self, caller: Caller, draw: Callable[[], float] = random.random) -> Share:
        """Who answers this request. A pin is answered as a share of weight 0."""
        for pin in self.pins:
            if caller.header(pin.header) == pin.value:
                return Share(pin.version, 0)
        if len(self.shares) == 1:
            return self.shares[0]
        key = self.sticky.key(caller) if self.sticky is not None else None
        at = int(draw() * BASIS_POINTS) if key is None else self.bucket(key)
        for share in self.shares:
            at -= share.weight_bp
            if at < 0:
                return share
        return self.shares[-1]

    def bucket(self, key: str) -> int:
        """Of the 10,000, the one that a key falls into."""
        # Headers are decoded so that their bytes come back whole.
        text = key.encode("utf-8", "surrogateescape")
        return int(xxhash.xxh3_64_intdigest(self._prefix + text) % BASIS_POINTS)

    def is_copied(self, share: Share, draw: Callable[[], float] = random.random) -> bool:
        """Whether a copy of a request that this share answers goes to the shadow."""
        shadow = self.shadow
        if shadow is None or share.version == shadow.version:
            return False
        return shadow.share_bp >= BASIS_POINTS or draw() * BASIS_POINTS < shadow.share_bp

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for a message between processes and for the store."""
        wire = asdict(self)
        del wire["_prefix"]
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ModelRoute:
        """The inverse of `to_wire`, lists in place of tuples allowed."""
        sticky, shadow = wire["sticky"], wire["shadow"]
        return cls(
            shares=tuple(Share(**share) for share in wire["shares"]),
            salt=wire["salt"],
            sticky=None if sticky is None else Sticky(**sticky),
            pins=tuple(Pin(**pin) for pin in wire["pins"]),
            shadow=None if shadow is None else Shadow(**shadow),
        )


def _cookie(header: str | None, name: str) -> str | None:
    """A cookie's value; None where there is none, or nothing that can be read."""
    if header is None:
        return None
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return None
    return None if morsel is None else morsel.value
