"""Splits, parses and validates the input file of a batch. Pure."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import Any, NamedTuple

import orjson

from gateway.http.request_body import MAX_DEPTH, is_too_deep
from schemas.batches import MAX_ERRORS, MAX_REQUESTS, BatchError

BOM = b"\xef\xbb\xbf"
MAX_CUSTOM_ID = 512


class InputLine(NamedTuple):
    """A line of the input file that is not blank."""

    number: int
    """The line number in the file, from 1."""
    data: bytes


class LineTooLong(Exception):
    """A line is longer than the maximum size of a request."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def split_lines(pieces: AsyncGenerator[bytes, None], longest: int) -> AsyncGenerator[InputLine, None]:
    """Yield lines in order, with one line and one piece in memory. Closes `pieces`. Raises LineTooLong and the errors of `pieces`."""
    rest, number = bytearray(), 0
    async with aclosing(pieces):
        async for piece in pieces:
            begin = 0
            while (end := piece.find(b"\n", begin)) >= 0:
                rest += piece[begin:end]
                begin = end + 1
                number += 1
                _check_length(rest, longest, number)
                if line := _stripped(rest, number):
                    yield InputLine(number, line)
                rest = bytearray()
            rest += piece[begin:] if begin else piece
            _check_length(rest, longest, number + 1)
    if line := _stripped(rest, number + 1):
        yield InputLine(number + 1, line)


def _check_length(line: bytearray, longest: int, number: int) -> None:
    if len(line) > longest:
        raise LineTooLong(number)


def _stripped(line: bytearray, number: int) -> bytes:
    data = bytes(line)
    return (data.removeprefix(BOM) if number == 1 else data).strip(b" \t\r")


@dataclass(frozen=True, slots=True)
class BatchLineRequest:
    """One request of a batch, from one line of its input."""

    custom_id: str
    body: dict[str, Any]


class InvalidLine(Exception):
    """A line is not a valid request of its batch."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def at(self, line: int) -> BatchError:
        """Return the error as the batch reports it."""
        return BatchError(code=self.code, message=self.message, line=line, param=self.param)


def parse_line(data: bytes, endpoint: str) -> BatchLineRequest:
    """Parse a line. Raises InvalidLine."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidLine("invalid_json_line", f"This line is not parseable as valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidLine("invalid_json_line", "This line is not a JSON object.")
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and is_too_deep(value):
        raise InvalidLine("invalid_json_line", f"This line is nested deeper than {MAX_DEPTH} levels.")
    for name in ("custom_id", "method", "url", "body"):
        if value.get(name) is None:
            raise InvalidLine("missing_required_parameter", f"This line has no '{name}'.", name)
    custom_id, body = value["custom_id"], value["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise InvalidLine(
            "invalid_custom_id", f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters.", "custom_id"
        )
    if value["method"] != "POST":
        raise InvalidLine("invalid_method", "'method' must be 'POST'.", "method")
    if value["url"] != endpoint:
        raise InvalidLine("invalid_url", f"'url' must be the endpoint of the batch, '{endpoint}'.", "url")
    if not isinstance(body, dict):
        raise InvalidLine("invalid_body", "'body' must be a JSON object.", "body")
    return BatchLineRequest(custom_id, body)


def job_id(batch_id: str, number: int) -> str:
    """Return the job id of a line: a UUIDv7 that depends only on the batch and the line number, ordered by line."""
    made = int(batch_id.removeprefix("batch_"), 16) >> 80
    digest = int.from_bytes(sha256(f"{batch_id}\n{number}".encode()).digest()[:8], "big")
    bits = (number & 0xFFFFF) << 54 | digest & (1 << 54) - 1
    return f"job_{made << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0x2 << 62 | bits & (1 << 62) - 1:032x}"


def line_jobs(batch_id: str, newest_first: bool) -> Iterator[str]:
    """Yield the ids of all jobs that lines of a batch can have, in their order. The batch's id must be well-formed."""
    numbers = range(1, MAX_REQUESTS + 1)
    return (job_id(batch_id, number) for number in (reversed(numbers) if newest_first else numbers))


def request_ids(job: str) -> tuple[str, str]:
    """Return the ids of a line's request, derived from its job id: the id in the output file, and the request id."""
    number = job.removeprefix("job_")
    return f"batch_req_{number}", f"req_{sha256(number.encode()).hexdigest()[:24]}"


@dataclass(slots=True)
class ValidationReport:
    """The result of validating an input file."""

    total: int = 0
    """The number of requests."""
    model: str | None = None
    """The model of the first request."""
    errors: list[BatchError] = field(default_factory=list)
    """The errors, at most `MAX_ERRORS`. A batch with errors fails."""


async def validate(lines: AsyncIterator[InputLine], endpoint: str) -> ValidationReport:
    """Validate the lines until `MAX_ERRORS` errors are found. Raises the errors of `lines` except LineTooLong."""
    report = ValidationReport()
    seen: set[bytes] = set()
    try:
        async for line in lines:
            report.total += 1
            if report.total > MAX_REQUESTS:
                report.errors.append(_too_many(line.number))
                break
            try:
                _validate_line(line, endpoint, seen, report)
            except InvalidLine as error:
                report.errors.append(error.at(line.number))
            if len(report.errors) == MAX_ERRORS:
                break
    except LineTooLong as error:
        report.errors.append(
            BatchError(
                code="line_too_long", message="This line exceeds the maximum size of a request.", line=error.number
            )
        )
    if not report.total and not report.errors:
        report.errors.append(BatchError(code="empty_file", message="The input file contains no request."))
    return report


def _validate_line(line: InputLine, endpoint: str, seen: set[bytes], report: ValidationReport) -> None:
    request = parse_line(line.data, endpoint)
    mark = blake2b(request.custom_id.encode(), digest_size=8).digest()
    if mark in seen:
        raise InvalidLine(
            "duplicate_custom_id",
            f"The custom_id '{request.custom_id[:100]}' already appears in an earlier line.",
            "custom_id",
        )
    seen.add(mark)
    model = request.body.get("model")
    if report.total == 1 and isinstance(model, str):
        report.model = model[:256]


def _too_many(line: int) -> BatchError:
    return BatchError(
        code="too_many_requests",
        message=f"A batch can contain at most {MAX_REQUESTS} requests. Split the file.",
        line=line,
    )
