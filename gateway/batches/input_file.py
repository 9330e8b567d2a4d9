"""The lines of a batch's input: found in the file as it is read, and understood. Pure."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
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
    """A line that is not blank."""

    number: int
    """In the file, from 1."""
    data: bytes


class LineTooLong(Exception):
    """A line is longer than what is held in memory."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def split_lines(pieces: AsyncGenerator[bytes, None], longest: int) -> AsyncGenerator[InputLine, None]:
    """Lines in order. Closes `pieces`. Raises LineTooLong, and what `pieces` raises; holds one line and one piece."""
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
class Request:
    """One request of a batch."""

    custom_id: str
    body: dict[str, Any]


class InvalidLine(Exception):
    """A line is not a request of this batch."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def at(self, line: int) -> BatchError:
        """What the batch tells."""
        return BatchError(code=self.code, message=self.message, line=line, param=self.param)


def parse_line(data: bytes, endpoint: str) -> Request:
    """What a line asks for. Raises InvalidLine."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidLine("invalid_json_line", f"This line is not parseable as valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidLine("invalid_json_line", "This line is no JSON object.")
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and is_too_deep(value):
        raise InvalidLine("invalid_json_line", f"This line is nested deeper than {MAX_DEPTH} levels.")
    for name in ("custom_id", "method", "url", "body"):
        if value.get(name) is None:
            raise InvalidLine("missing_required_parameter", f"This line lacks '{name}'.", name)
    custom_id, body = value["custom_id"], value["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise InvalidLine(
            "invalid_custom_id", f"'custom_id' is a text of 1 to {MAX_CUSTOM_ID} characters.", "custom_id"
        )
    if value["method"] != "POST":
        raise InvalidLine("invalid_method", "'method' must be 'POST'.", "method")
    if value["url"] != endpoint:
        raise InvalidLine("invalid_url", f"'url' must be the endpoint of the batch, '{endpoint}'.", "url")
    if not isinstance(body, dict):
        raise InvalidLine("invalid_body", "'body' must be a JSON object.", "body")
    return Request(custom_id, body)


def job_id(batch_id: str, number: int) -> str:
    """The id of the job of a line, always the same: a UUIDv7 of the batch's time, in the order of lines."""
    made = int(batch_id.removeprefix("batch_"), 16) >> 80
    digest = int.from_bytes(sha256(f"{batch_id}\n{number}".encode()).digest()[:8], "big")
    bits = (number & 0xFFFFF) << 54 | digest & (1 << 54) - 1
    return f"job_{made << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0x2 << 62 | bits & (1 << 62) - 1:032x}"


def request_ids(job: str) -> tuple[str, str]:
    """The ids of a line's request that follow from its job's: in the output file, and where the job tells none."""
    number = job.removeprefix("job_")
    return f"batch_req_{number}", f"req_{sha256(number.encode()).hexdigest()[:24]}"


async def behind(lines: AsyncIterator[InputLine], number: int) -> AsyncIterator[InputLine]:
    """The lines that come after line `number`."""
    async for line in lines:
        if line.number > number:
            yield line


@dataclass(slots=True)
class ValidationReport:
    """What was found."""

    total: int = 0
    """Requests."""
    model: str | None = None
    """The first request's."""
    errors: list[BatchError] = field(default_factory=list)
    """Any: the batch has failed. At most `MAX_ERRORS`."""


async def validate(lines: AsyncIterator[InputLine], endpoint: str) -> ValidationReport:
    """Look at every line, or at so many that no more can be told. Raises what `lines` raises, but for LineTooLong."""
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
            BatchError(code="line_too_long", message="This line is larger than a request may be.", line=error.number)
        )
    if not report.total and not report.errors:
        report.errors.append(BatchError(code="empty_file", message="The input file holds no request."))
    return report


def _validate_line(line: InputLine, endpoint: str, seen: set[bytes], report: ValidationReport) -> None:
    request = parse_line(line.data, endpoint)
    mark = blake2b(request.custom_id.encode(), digest_size=8).digest()
    if mark in seen:
        raise InvalidLine(
            "duplicate_custom_id", f"The custom_id '{request.custom_id[:100]}' stands in an earlier line.", "custom_id"
        )
    seen.add(mark)
    model = request.body.get("model")
    if report.total == 1 and isinstance(model, str):
        report.model = model[:256]


def _too_many(line: int) -> BatchError:
    return BatchError(code="too_many_requests", message=f"A batch holds at most {MAX_REQUESTS} requests.", line=line)
