"""Define the header that counts the Nexus gateways a request has passed, which ends loops."""

from __future__ import annotations

HOPS_HEADER = "x-nexus-hops"
"""Workers send it with every request to an inference server. Gateways refuse more than `GATEWAY_MAX_HOPS`, and send it with that refusal, also when they
pass on another gateway's refusal.
"""
LOOP_STATUS = 508
MAX_HOPS = 8
"""The highest value that an operator may configure."""


def parse_hops(value: bytes) -> int:
    """Return the number in a header's value. An invalid value returns more than any limit."""
    return int(value) if value.isdigit() and len(value) <= 3 else MAX_HOPS + 1
