"""Addresses of the internet and special ones: the same on every version of Python."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from backbone.public_addresses import is_public

SPECIAL = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "::/96",
    "::ffff:0:0:0/96",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/32",
    "2001:1::1/128",
    "2001:1::2/128",
    "2001:2::/48",
    "2001:3::/32",
    "2001:4:112::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:30::/28",
    "2001:db8::/32",
    "2620:4f:8000::/48",
    "3ffe::/16",
    "3fff::/20",
    "5f00::/16",
    "4000::/3",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "93.184.216.34",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "169.253.255.255",
    "172.15.255.255",
    "172.32.0.0",
    "191.255.255.255",
    "192.0.1.0",
    "192.0.3.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::",
    "2001:4860:4860::8888",
    "2606:2800:220:1:248:1893:25c8:1946",
    "2a00:1450:4001:81b::200e",
    "3ffd::1",
    "3fff:1000::",
]
INNER = ("::ffff:{}", "64:ff9b::{}")


@pytest.mark.parametrize("block", SPECIAL)
def test_a_special_block_is_not_public_from_its_first_to_its_last_address(block: str) -> None:
    network = ip_network(block)
    middle = network[network.num_addresses // 2]
    assert not any(map(is_public, (network[0], middle, network[-1])))


@pytest.mark.parametrize("address", PUBLIC)
def test_the_addresses_beside_them_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("block", [block for block in SPECIAL if "." in block])
def test_a_special_address_within_an_ipv6_address_is_not_public(block: str) -> None:
    for address in (ip_network(block)[0], ip_network(block)[-1]):
        for form in INNER:
            assert not is_public(ip_address(form.format(address)))
        assert not is_public(ip_address(0x2002 << 112 | int(address) << 80 | 1))


def test_a_public_address_within_an_ipv6_address_is_public_where_it_is_reached_by_it() -> None:
    for form in INNER:
        assert is_public(ip_address(form.format("93.184.216.34")))
    assert is_public(ip_address(0x2002 << 112 | int(ip_address("93.184.216.34")) << 80 | 1))
    for unreachable in ("::93.184.216.34", "2001:0:5db8:d822::a247:27dd", "64:ff9b:1::93.184.216.34"):
        assert not is_public(ip_address(unreachable))
