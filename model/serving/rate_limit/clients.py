"""Who asks: the address that a limit counts by, also behind proxies that can be trusted and headers that cannot.

A proxy appends the address that it was asked from to `X-Forwarded-For`. What stands left of the last trusted proxy's
entry was sent by the client and may be invented, so the list is read from its right end, and only as far as
trusted proxies have written it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

from model.errors import InputError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNKNOWN = "unknown"
"""Who asks over a connection without an address (a Unix socket), and through a proxy that hides it: one client."""
HOPS = 32
"""Entries of the header that are looked at, from its right end; a longer way is nobody's real one."""
GROUP = 64
"""Bits by which IPv6 clients are told apart: one household or host has all addresses of such a network."""


class Clients:
    """Finds the client of a request. `trusted`: networks of proxies, or how many proxies stand in front."""

    def __init__(self, trusted: Sequence[Network] | int = ()) -> None:
        self._trusted = trusted

    @classmethod
    def read(cls, text: str | None) -> Clients:
        """From the setting: `10.0.0.0/8, 192.0.2.7`, or `1`. Raises `InputError`."""
        if text is None:
            return cls()
        if text.strip().isascii() and text.strip().isdigit():
            count = int(text) if len(text.strip()) <= 3 else HOPS + 1
            if not 0 <= count <= HOPS:
                raise InputError(
                    "STORY_TRUSTED_PROXIES", f"must be at most {HOPS} proxies, got {text.strip()}"
                )
            return cls(count)
        networks: list[Network] = []
        for part in text.split(","):
            try:
                networks.append(ipaddress.ip_network(part.strip()))
            except ValueError:
                raise InputError(
                    "STORY_TRUSTED_PROXIES",
                    "must be addresses and networks such as 10.0.0.0/8 with commas between them, or how many "
                    f"proxies stand in front; got {part.strip()!r}",
                ) from None
        return cls(networks)

    def of(self, scope: Any) -> str:
        """The client of an ASGI request, in the form in which it is counted."""
        peer = scope.get("client")
        return self.client(peer[0] if peer else None, Headers(scope=scope).getlist("x-forwarded-for"))

    def client(self, peer: str | None, forwarded: Sequence[str]) -> str:
        """The client of a connection from `peer` that carried these `X-Forwarded-For` headers, in their order."""
        if isinstance(self._trusted, int):
            return grouped(self._counted(peer, forwarded, self._trusted))
        found = _address(peer)
        if found is None or not self._trusts(found):
            return grouped(found)
        for entry in reversed(_entries(forwarded)):
            further = _address(entry)
            if further is None:  # the proxy does not say whom it speaks for
                break
            found = further
            if not self._trusts(found):
                break
        return grouped(found)

    def _counted(self, peer: str | None, forwarded: Sequence[str], proxies: int) -> Address | None:
        chain = [*_entries(forwarded), peer]
        # Fewer entries than proxies: some proxy was passed by, or is silent. The first that is known counts.
        return _address(chain[max(0, len(chain) - 1 - proxies)])

    def _trusts(self, address: Address) -> bool:
        assert not isinstance(self._trusted, int), "counted proxies are not asked for by address"
        return any(address in network for network in self._trusted)


def grouped(address: Address | None) -> str:
    """The name by which an address is counted: itself, or the /64 network of an IPv6 one."""
    if address is None:
        return UNKNOWN
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), GROUP), strict=False))
    return str(address)


def _entries(forwarded: Sequence[str]) -> list[str]:
    """The last entries of all these headers together."""
    return [entry.strip() for entry in ",".join(forwarded).rsplit(",", HOPS)[-HOPS:] if entry.strip()]


def _address(text: str | None) -> Address | None:
    """The address in `192.0.2.7`, `192.0.2.7:80`, `2001:db8::1`, `[2001:db8::1]:80`; None where there is none."""
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
