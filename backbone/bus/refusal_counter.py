"""Counts what was refused on a connection: invalid subjects and unreadable messages."""

from __future__ import annotations

from collections import Counter

import structlog

log = structlog.get_logger(__name__)


KINDS = ("worker", "address", "question", "message")
"""A worker's name, a reply address, a gate request, and any other message of a worker."""


class RefusalCounter:
    """Counts refusals by kind. The first of a kind is logged: a hostile peer must not fill the log."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))

    def add(self, kind: str, **fields: object) -> None:
        """Count one refusal, and log it if it is the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            log.warning("bus.refused", kind=kind, more="counted in nexus_bus_refused_total, not logged", **fields)
