"""Grouping of addresses, and the headers of trusted proxies."""

from __future__ import annotations

import pytest

from gateway.http.client_addresses import TrustedProxies, group_of


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("", ""),
        ("nonsense", "nonsense"),
    ],
)
def test_groups(address: str, group: str) -> None:
    """An IPv4 address counts alone, however it is written; of IPv6 a /64 counts as one."""
    assert group_of(address) == group


@pytest.mark.parametrize(
    ("forwarded", "caller"),
    [
        ([], "10.0.0.1"),
        ([b"203.0.113.7"], "203.0.113.7"),
        ([b"1.1.1.1, 203.0.113.7"], "203.0.113.7"),
        ([b"1.1.1.1", b"203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        ([b"2001:db8::5"], "2001:db8::/64"),
        ([b"[2001:db8::5]"], "2001:db8::/64"),
        ([b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ([b"\xff\xfe"], "\xff\xfe"),
    ],
)
def test_forwarded(forwarded: list[bytes], caller: str) -> None:
    """The nearest address that no trusted proxy has: what stands left of it may be made up."""
    proxies = TrustedProxies("10.0.0.0/8, 2001:db8:ffff::/48")
    assert proxies.caller("10.0.0.1", [(b"x-forwarded-for", value) for value in forwarded]) == caller


def test_trust() -> None:
    """Addresses and ranges are trusted; nobody is by default; what is no address is a mistake to be told of."""
    proxies = TrustedProxies("10.0.0.0/8,192.0.2.1, 2001:db8:ffff::/48")
    assert all(address in proxies for address in ("10.1.2.3", "192.0.2.1", group_of("2001:db8:ffff:1::5")))
    assert not any(address in proxies for address in ("192.0.2.2", "", "nonsense", group_of("2001:db8:1::5")))
    assert "10.0.0.1" not in TrustedProxies()
    with pytest.raises(ValueError, match="caddy"):
        TrustedProxies("caddy")
