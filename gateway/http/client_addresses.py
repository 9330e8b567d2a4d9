"""Callers' addresses: which of them count as one, and what a proxy in front says of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

PREFIX_V6 = 64
"""Bits: whoever has one IPv6 address has at least as many as share these."""


@lru_cache(maxsize=4096)
def group_of(text: str) -> str:
    """Return what an address counts as: an IPv4 address as itself, an IPv6 address as its /64. What is neither stays as it is."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return text[:64]
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if not address.is_loopback:
            return str(ip_network((address, PREFIX_V6), strict=False))
    return str(address)


def networks_of(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks of comma-separated addresses and CIDR ranges. Raises ValueError."""
    return tuple(ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())


class TrustedProxies:
    """Proxies whose word about callers' addresses (`X-Forwarded-For`) is believed."""

    def __init__(self, text: str = "") -> None:
        """`text`: comma-separated addresses and CIDR ranges. Raises ValueError."""
        self._networks = networks_of(text)
        self._is_trusted = lru_cache(maxsize=4096)(self._lies_within)

    def __contains__(self, group: str) -> bool:
        return bool(self._networks) and self._is_trusted(group)

    def _lies_within(self, text: str) -> bool:
        try:
            address = ip_address(text.partition("/")[0])
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def caller(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the nearest address in front of the trusted proxies, as `group_of` has it.

        Each proxy appends the address that it was reached from, so that only what stands left of an untrusted one can be made up.
        """
        hops = [hop for name, value in headers if name == b"x-forwarded-for" for hop in value.split(b",")]
        caller = peer
        for hop in reversed(hops[-16:]):
            caller = group_of(hop.strip().decode("latin-1").removeprefix("[").partition("]")[0])
            if caller not in self:
                break
        return caller
