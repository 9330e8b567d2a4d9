"""Counting what was refused on a connection: names that cannot be part of a subject, messages that cannot be read."""

from __future__ import annotations

from collections import Counter

import structlog

log = structlog.get_logger(__name__)


KINDS = ("worker", "address", "question", "message")
"""The name of a worker, the address for an answer, a question about a job, and anything else that a worker sent."""


class RefusalCounter:
    """The count of each kind of refusal. The first of a kind is logged: a hostile peer must not fill the log."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))

    def add(self, kind: str, **fields: object) -> None:
        """Count one refusal, and log it if it is the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            log.warning("bus.refused", kind=kind, more="counted in nexus_bus_refused_total, not logged", **fields)
