"""Find the client address that a rate limit counts by, also behind trusted proxies.

A proxy appends the address of its peer to `X-Forwarded-For`. Entries left of the last trusted proxy's own were sent by
the client and may be forged, so the list is read from its right end, and only as far as trusted proxies wrote it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

from model.settings import MAX_PROXIES

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNKNOWN = "unknown"
"""Client of a connection without an address (a Unix socket), and through a proxy that hides it."""
IPV6_PREFIX = 64
"""Bits that identify an IPv6 client: one household or host has all addresses of such a network."""


class Clients:
    """Finds the client of a request."""

    def __init__(self, trusted: Sequence[Network] | int = ()) -> None:
        """`trusted`: networks of proxies, or how many proxies stand in front."""
        self._trusted = trusted

    def of(self, scope: Any) -> str:
        """Return the client of an ASGI request, as it is counted."""
        peer = scope.get("client")
        return self.client(peer[0] if peer else None, Headers(scope=scope).getlist("x-forwarded-for"))

    def client(self, peer: str | None, forwarded: Sequence[str]) -> str:
        """Return the client of a connection from `peer` with these `X-Forwarded-For` headers, in their order."""
        if isinstance(self._trusted, int):
            return grouped(self._counted(peer, forwarded, self._trusted))
        found = _address(peer)
        if found is None or not self._trusts(found):
            return grouped(found)
        for entry in reversed(_entries(forwarded)):
            further = _address(entry)
            if further is None:  # the proxy hides its peer
                break
            found = further
            if not self._trusts(found):
                break
        return grouped(found)

    def _counted(self, peer: str | None, forwarded: Sequence[str], proxies: int) -> Address | None:
        chain = [*_entries(forwarded), peer]
        # Fewer entries than proxies: some proxy was bypassed, or adds none. The first known entry counts.
        return _address(chain[max(0, len(chain) - 1 - proxies)])

    def _trusts(self, address: Address) -> bool:
        assert not isinstance(self._trusted, int), "counted proxies are not matched by address"
        return any(address in network for network in self._trusted)


def grouped(address: Address | None) -> str:
    """Return the name that an address is counted by: itself, or the /64 network of an IPv6 one."""
    if address is None:
        return UNKNOWN
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), IPV6_PREFIX), strict=False))
    return str(address)


def _entries(forwarded: Sequence[str]) -> list[str]:
    """Return the last entries of all these headers together."""
    return [
        entry.strip()
        for entry in ",".join(forwarded).rsplit(",", MAX_PROXIES)[-MAX_PROXIES:]
        if entry.strip()
    ]


def _address(text: str | None) -> Address | None:
    """Parse `192.0.2.7`, `192.0.2.7:80`, `2001:db8::1`, `[2001:db8::1]:80`; None where there is none."""
    if not text:
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
