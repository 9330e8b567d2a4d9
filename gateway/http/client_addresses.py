"""Group callers' addresses, and read them from the headers of trusted proxies."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

PREFIX_V6 = 64
"""Bits of an IPv6 address that identify a caller: a caller usually has at least a /64 network."""


@lru_cache(maxsize=4096)
def group_of(text: str) -> str:
    """Return an IPv4 address unchanged and an IPv6 address as its /64 network. Text that is no address is cut to 64 characters."""
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


def parse_networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Parse comma-separated addresses and CIDR ranges. Raises ValueError."""
    return tuple(ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())


class AddressSet:
    """A set of addresses, given as addresses and CIDR ranges. It contains callers' addresses as `group_of` returns them."""

    def __init__(self, text: str = "") -> None:
        """`text`: comma-separated addresses and CIDR ranges. Raises ValueError."""
        self._networks = parse_networks(text)
        self._is_trusted = lru_cache(maxsize=4096)(self._lies_within)

    def __contains__(self, group: str) -> bool:
        return bool(self._networks) and self._is_trusted(group)

    def _lies_within(self, text: str) -> bool:
        try:
            address = ip_address(text.partition("/")[0])
        except ValueError:
            return False
        return any(address in network for network in self._networks)


class TrustedProxies(AddressSet):
    """Holds the proxies whose `X-Forwarded-For` is trusted."""

    def caller(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the nearest address in front of the trusted proxies, grouped by `group_of`.

        Each proxy appends the address it was reached from, so that only addresses to the left of an untrusted one can be forged.
        """
        hops = [hop for name, value in headers if name == b"x-forwarded-for" for hop in value.split(b",")]
        caller = peer
        for hop in reversed(hops[-16:]):
            caller = group_of(hop.strip().decode("latin-1").removeprefix("[").partition("]")[0])
            if caller not in self:
                break
        return caller
