"""How a request says through how many Nexus gateways it has come, so that none goes round in circles."""

from __future__ import annotations

HOPS_HEADER = "x-nexus-hops"
"""Workers send it with every request to an inference server; gateways refuse more than `GATEWAY_MAX_HOPS`, and set it on that refusal, also where another
gateway's is passed on."""
LOOP_STATUS = 508
MAX_HOPS = 8
"""The most that an operator may allow."""


def parse_hops(value: bytes) -> int:
    """Return the number that a header's value gives; more than any limit, where it gives none."""
    return int(value) if value.isdigit() and len(value) <= 3 else MAX_HOPS + 1
