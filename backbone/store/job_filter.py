"""Conditions on job records.

A store looks for the text that a record which meets a condition must hold in its JSON, and decodes only records that hold all of
it. A record may hold the text elsewhere, as in its metadata: `JobFilter.matches` decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic_core import to_json

from schemas.jobs import JobRecord

ATTRIBUTES: Mapping[str, str] = {
    "status": "status",
    "model": "public_model",
    "endpoint": "endpoint",
    "capability": "capability",
    "service_tier": "lane",
    "key": "key",
    "worker": "worker",
    "batch": "batch",
    "request_id": "request_id",
}
"""The attributes of a record that can be compared, by their names in its JSON."""


class Range(NamedTuple):
    """Bounds of a number in a record, both inclusive. None: no bound. A record without the number is outside."""

    name: str
    least: float | None = None
    most: float | None = None
    since: str = ""
    """The name of the number that is subtracted. Empty: none."""

    def holds(self, record: JobRecord) -> bool:
        """Return whether the record's number is within the bounds."""
        value = getattr(record, self.name)
        start = getattr(record, self.since) if self.since else 0
        if value is None or start is None:
            return False
        value -= start
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Conditions, all of which a record must meet. The default meets every record."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By a name of `ATTRIBUTES`: the record has one of these values."""
    errors: tuple[str, ...] = ()
    """The record's error has one of these codes; or one of these types, where it has no code."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The record has all of these."""
    ranges: tuple[Range, ...] = ()
    first_id: str = ""
    """The smallest id. Empty: any."""
    last_id: str = ""
    """A bound above the greatest id, exclusive. Empty: any."""

    def matches(self, record: JobRecord) -> bool:
        """Return whether the record meets the conditions."""
        return (
            all(getattr(record, ATTRIBUTES[name]) in values for name, values in self.values.items())
            and (not self.errors or error_code(record) in self.errors)
            and all(record.metadata.get(name) == value for name, value in self.metadata.items())
            and all(one.holds(record) for one in self.ranges)
            and record.job >= self.first_id
            and (not self.last_id or record.job < self.last_id)
        )

    def texts(self) -> list[list[bytes]]:
        """Return lists of texts: the JSON of a record that meets the conditions holds one text of each list."""
        groups = [[_member(name, value) for value in values] for name, values in self.values.items()]
        if self.errors:
            groups.append([_member(name, value) for value in self.errors for name in ("code", "type")])
        return groups + [[_member(name, value)] for name, value in self.metadata.items()]


def error_code(record: JobRecord) -> str | None:
    """Return the code of a failed job's error, or its type where it has no code."""
    error = record.error or {}
    code: str | None = error.get("code") or error.get("type")
    return code


def _member(name: str, value: str) -> bytes:
    """Return a member of a JSON object without its first quote: a search for a character that occurs so often is slow."""
    return b"%b:%b" % (to_json(name)[1:], to_json(value))
