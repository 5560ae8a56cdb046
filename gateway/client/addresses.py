"""The servers that a client may ask, and which of them is worth asking now.

An address that refuses connections or answers 503 is put aside for a time that doubles with each failure
in a row. Being aside is a preference, not a ban: when nothing better is left, it is asked all the same.
When its time is up one call tries it, and the others follow once that one was answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from gateway.clock import NS_PER_S

FIRST_ASIDE_NS = NS_PER_S // 2
"""How long an address is put aside for its first failure."""

MAX_ASIDE_NS = 10 * NS_PER_S
"""Longest time for which an address is put aside, whatever its Retry-After says."""


@dataclass(slots=True, eq=False)
class Address:
    """One server. ``url`` has no slash at its end.

    ``epoch`` changes with each failure that counted: what was sent in an earlier one says nothing about
    the address as it is now, so a hundred requests that fail together count once.
    """

    url: str
    failures: int = 0
    aside_until_ns: int = 0
    epoch: int = 0


def parse_addresses(addresses: str | Sequence[str]) -> list[Address]:
    """Addresses from ``host:port`` or ``http[s]://host[:port][/base]``, one or several.

    Raises:
        ValueError: none is given, or one cannot be read.
    """
    given = [addresses] if isinstance(addresses, str) else list(addresses)
    if not given:
        raise ValueError("expected at least one address")
    return [Address(_url(text)) for text in dict.fromkeys(given)]


def _url(text: str) -> str:
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    _ = parts.port  # ValueError where it is no number
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"expected host:port or http[s]://host[:port][/base], got {text!r}")
    return url.rstrip("/")


class Addresses:
    """Chooses among addresses, in turn, and remembers which failed."""

    def __init__(self, addresses: list[Address]) -> None:
        self.all = tuple(addresses)
        self._turn = 0

    def pick(self, waits_ns: Mapping[Address, int], now_ns: int) -> tuple[Address, int]:
        """The address to ask next and the moment from which it may be asked.

        Args:
            waits_ns: for each address that this call has tried, when it may try it again.
            now_ns: the present moment.
        """
        count = len(self.all)

        def rank(position: int) -> tuple[int, bool, bool, int]:
            address = self.all[position]
            start_ns = max(now_ns, waits_ns.get(address, now_ns))
            aside = address.aside_until_ns > now_ns
            return start_ns, aside, address in waits_ns, (position - self._turn) % count

        best = min(range(count), key=rank)
        self._turn = (best + 1) % count
        address = self.all[best]
        return address, rank(best)[0]

    def asked(self, address: Address, now_ns: int) -> int:
        """Note that a request is sent; the epoch to report its outcome with."""
        if address.failures:  # this call tries it; others look elsewhere meanwhile
            address.aside_until_ns = max(address.aside_until_ns, now_ns + _aside_ns(address))
        return address.epoch

    def answered(self, address: Address, epoch: int) -> None:
        """The address is well."""
        if epoch == address.epoch:
            address.failures = address.aside_until_ns = 0

    def failed(self, address: Address, epoch: int, now_ns: int, retry_after_ns: int = 0) -> int:
        """The address refused a connection or answered 503; until when it is aside."""
        if epoch == address.epoch:
            address.epoch += 1
            address.failures += 1
            aside_ns = max(_aside_ns(address), min(retry_after_ns, MAX_ASIDE_NS))
            address.aside_until_ns = now_ns + aside_ns
        return address.aside_until_ns


def _aside_ns(address: Address) -> int:
    return backoff_ns(address.failures)


def backoff_ns(failures: int) -> int:
    """How long to stay away after so many failures in a row, at least one."""
    return min(FIRST_ASIDE_NS << min(failures - 1, 16), MAX_ASIDE_NS)
