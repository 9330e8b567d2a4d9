"""Distinguishes public addresses from special ones, by a table of its own: `ipaddress.is_global` differs between versions of
Python.

Sources: IANA's special-purpose registries for IPv4 and IPv6 (RFC 6890 and later), and its IPv6 address space. Blocks that a
registry calls globally reachable within one that is not (192.0.0.9, ORCHIDv2) hold nothing to fetch, and count as special here.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

SPECIAL_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private use
            "100.64.0.0/10",  # shared address space, carriers' and some clouds' metadata
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local, clouds' metadata
            "172.16.0.0/12",  # private use
            "192.0.0.0/24",  # IETF protocol assignments, a cloud's metadata
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private use
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
        ),
    )
)
UNICAST_V6 = IPv6Network("2000::/3")
"""The block that IANA assigns for the internet. Outside it: ::, ::1, ::/96, 64:ff9b:1::/48, 100::/64, 5f00::/16, fc00::/7,
fe80::/10, fec0::/10, ff00::/8.
"""
SPECIAL_V6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # IETF protocol assignments: Teredo, benchmarks, ORCHID, AMT
            "2001:db8::/32",  # documentation
            "2620:4f:8000::/48",  # AS112
            "3ffe::/16",  # 6bone, returned
            "3fff::/20",  # documentation
        ),
    )
)
WRAPPED = (
    (IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("2002::/16"), 80),  # 6to4
)
"""Blocks whose addresses embed an IPv4 address, and the number of bits after it."""


def is_public(address: Address) -> bool:
    """Return whether the internet can reach this address; one that embeds an IPv4 address counts as that address."""
    if isinstance(address, IPv4Address):
        return not any(address in block for block in SPECIAL_V4)
    for block, behind in WRAPPED:
        if address in block:
            return is_public(IPv4Address(int(address) >> behind & 0xFFFFFFFF))
    return address in UNICAST_V6 and not any(address in block for block in SPECIAL_V6)
