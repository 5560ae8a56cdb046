"""What a browser is kept from: pages of other sites must not act on the admin port, nor read it.

A page may send requests anywhere. Three things tell them from our own page's: ``Host`` (a foreign name
that was made to resolve to this machine: DNS rebinding), ``Origin`` and ``Sec-Fetch-Site``. Programs send
none of the last two, and are not held to them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from gateway.errors import Forbidden, InvalidRequest

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")


class Site:
    """Where the admin port is, and so what its requests may say about it.

    Args:
        host: the setting that the listener was opened with.
        is_loopback: whether only this machine reaches the listener. Names of others lead here only by
            rebinding then; else a key is needed anyway, which a foreign page does not have.
    """

    def __init__(self, host: str, is_loopback: bool) -> None:
        self._names = {host.lower(), "localhost"}
        self._is_loopback = is_loopback

    def check_host(self, hosts: Sequence[str]) -> None:
        """Hold the ``Host`` headers of a request to what leads here; HTTP/1.0 may have none.

        Raises:
            InvalidRequest: more than one, or no host.
            Forbidden: a foreign name.
        """
        if not hosts:
            return
        found = _AUTHORITY.fullmatch(hosts[0])
        if found is None or len(hosts) > 1:
            raise InvalidRequest("expected one Host header with a name or an address")
        name = found[1].lower()
        if self._is_loopback and name not in self._names and not _is_address(name):
            raise Forbidden(
                "this port is for this machine: use its address, localhost or the setting admin_host"
            )


def check_origin(
    method: str,
    host: str | None,
    origin: str | None,
    fetch_site: str | None,
    fetch_mode: str | None,
) -> None:
    """Refuse what another site's page sends, but for a link that somebody followed.

    Args:
        method: of the request.
        host: its ``Host``.
        origin: its ``Origin``.
        fetch_site: its ``Sec-Fetch-Site``.
        fetch_mode: its ``Sec-Fetch-Mode``.

    Raises:
        Forbidden: it comes from another site.
    """
    is_change = method not in SAFE_METHODS
    if fetch_site == "cross-site" and (is_change or fetch_mode != "navigate"):
        raise Forbidden("requests of other sites' pages are refused")
    if is_change and origin is not None and not is_own_origin(origin, host):
        raise Forbidden("the Origin is not this server's")


def is_own_origin(origin: str, host: str | None) -> bool:
    """Whether an ``Origin`` is what a browser says of pages from this ``Host``, by http or by https."""
    scheme, separator, authority = origin.partition("://")
    is_http = separator != "" and scheme in ("http", "https")
    return is_http and host is not None and authority.lower() == host.lower()


def is_loopback(address: str) -> bool:
    """Whether an address, as a socket tells it, is this machine's own and no other's."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
