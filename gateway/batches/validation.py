"""Looking through a batch's input before any of it runs. Holds eight bytes of each `custom_id`, and no line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from hashlib import blake2b

from gateway.batches.lines import BadLine, Line, LineTooLong, parse_line
from schemas.batches import MAX_ERRORS, MAX_REQUESTS, BatchError


@dataclass(slots=True)
class Findings:
    """What was found."""

    total: int = 0
    """Requests."""
    model: str | None = None
    """The first request's."""
    errors: list[BatchError] = field(default_factory=list)
    """Any: the batch has failed. At most `MAX_ERRORS`."""


async def validate(lines: AsyncIterator[Line], endpoint: str) -> Findings:
    """Look at every line, or at so many that no more can be told. Raises what `lines` raises, but for LineTooLong."""
    found = Findings()
    seen: set[bytes] = set()
    try:
        async for line in lines:
            found.total += 1
            if found.total > MAX_REQUESTS:
                found.errors.append(_too_many(line.number))
                break
            try:
                _look(line, endpoint, seen, found)
            except BadLine as error:
                found.errors.append(error.at(line.number))
            if len(found.errors) == MAX_ERRORS:
                break
    except LineTooLong as error:
        found.errors.append(
            BatchError(code="line_too_long", message="This line is larger than a request may be.", line=error.number)
        )
    if not found.total and not found.errors:
        found.errors.append(BatchError(code="empty_file", message="The input file holds no request."))
    return found


def _look(line: Line, endpoint: str, seen: set[bytes], found: Findings) -> None:
    request = parse_line(line.data, endpoint)
    mark = blake2b(request.custom_id.encode(), digest_size=8).digest()
    if mark in seen:
        raise BadLine(
            "duplicate_custom_id", f"The custom_id '{request.custom_id[:100]}' stands in an earlier line.", "custom_id"
        )
    seen.add(mark)
    model = request.body.get("model")
    if found.total == 1 and isinstance(model, str):
        found.model = model[:256]


def _too_many(line: int) -> BatchError:
    return BatchError(code="too_many_requests", message=f"A batch holds at most {MAX_REQUESTS} requests.", line=line)
