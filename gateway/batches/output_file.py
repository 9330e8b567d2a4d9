"""Writes the output and error files of a batch: one JSON object per line, in the order of the input.

    {"id": "batch_req_…", "custom_id": "…", "response": {"status_code": 200, "request_id": "req_…", "body": {…}}, "error": null}

A response that is not JSON, such as audio, has the body `{"content_type": "audio/mpeg", "b64": "…"}`. A failed request has OpenAI's
error object as its body and the status of a synchronous request. A request that did not run to its end has no `response` but an
`error` with code and message.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import orjson

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore, BlobWriter
from gateway.batches.input_file import request_ids
from gateway.files import FileStore
from gateway.jobs.api import JobResult
from gateway.jobs.http_response import ResultBody
from schemas.batches import Batch
from schemas.errors import ErrorInfo
from schemas.files import BATCH_OUTPUT_PURPOSE
from schemas.outcome import Outcome

ResultBodyFactory = Callable[[JobResult, str], ResultBody]
TO_SPACES = bytes.maketrans(b"\r\n", b"  ")
"""Replaces line breaks, which JSON contains only between tokens, so that a value fits on one line."""


class OutputFile:
    """One output file of a batch. It exists only if something is written to it."""

    def __init__(self, files: FileStore, batch: Batch, file_id: str, kind: str) -> None:
        self._files = files
        self._batch = batch
        self._id = file_id
        self._kind = kind
        self._writer: BlobWriter | None = None
        self.lines = 0

    async def write(self, data: bytes) -> None:
        """Append data. Raises Unavailable."""
        if self._writer is None:
            self._writer = self._files.writer(self._batch.owner, self._batch.output_keep_s)
        await self._writer.write(data)

    async def publish(self) -> str | None:
        """Publish the file to the batch's owner, replacing that of an earlier try. Return its id, or None if it has no lines."""
        if self._writer is None:
            return None
        blob = await self._writer.close()
        record = await self._files.add(
            self._batch.owner,
            blob=blob.name,
            size=blob.size,
            filename=f"{self._batch.id}_{self._kind}.jsonl",
            purpose=BATCH_OUTPUT_PURPOSE,
            keep_s=self._batch.output_keep_s,
            content_type="application/jsonl",
            file_id=self._id,
        )
        self._writer = None
        return record.id

    async def discard(self) -> None:
        """Discard an unpublished file."""
        if self._writer is not None:
            await self._writer.abort()


def json_body(data: bytes) -> ResultBody:
    """Return a result body with these bytes of JSON."""

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return ResultBody("application/json", len(data), pieces)


async def check_blob(blobs: BlobStore, result: JobResult) -> None:
    """Read a result's blob completely before its line is written. Raises BlobNotFound, BlobCorrupted, Unavailable."""
    if result.blob is not None:
        async with aclosing(blobs.read(result.blob.name)) as pieces:
            async for _ in pieces:
                pass


class LineWriter:
    """Writes lines into both files."""

    async def answer(self, file: OutputFile, custom_id: str, outcome: Outcome, payload: ResultBody) -> None:
        """Write the line of a completed request. An error of the body's pieces leaves an incomplete line."""
        large = payload.size > INLINE_LIMIT_BYTES
        plain = _is_json(payload.content_type) and (large or await _is_object(payload))
        body = _one_line(payload.pieces()) if plain else _encoded(payload)
        await file.write(_head(custom_id, outcome, 200))
        async for piece in body:
            await file.write(piece)
        await file.write(b'},"error":null}\n')
        file.lines += 1

    async def failure(self, file: OutputFile, custom_id: str, outcome: Outcome, error: ErrorInfo) -> None:
        """Write the line of a failed request."""
        await file.write(_head(custom_id, outcome, error.status) + orjson.dumps(error.body()) + b'},"error":null}\n')
        file.lines += 1

    async def unanswered(self, file: OutputFile, custom_id: str, job: str, code: str, message: str) -> None:
        """Write the line of a request that did not run to its end."""
        line = {
            "id": request_ids(job)[0],
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": message},
        }
        await file.write(orjson.dumps(line) + b"\n")
        file.lines += 1


def _head(custom_id: str, outcome: Outcome, status: int) -> bytes:
    """Return a line up to the body of its response."""
    line_id, request_id = request_ids(outcome.job)
    return b'{"id":%b,"custom_id":%b,"response":{"status_code":%d,"request_id":%b,"body":' % (
        orjson.dumps(line_id),
        orjson.dumps(custom_id),
        status,
        orjson.dumps(outcome.request_id or request_id),
    )


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


async def _is_object(payload: ResultBody) -> bool:
    try:
        return isinstance(orjson.loads(b"".join([piece async for piece in payload.pieces()])), dict)
    except orjson.JSONDecodeError:
        return False


async def _one_line(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece.translate(TO_SPACES)


async def _encoded(payload: ResultBody) -> AsyncIterator[bytes]:
    yield b'{"content_type":%b,"b64":"' % orjson.dumps(payload.content_type)
    rest = b""
    async for piece in payload.pieces():
        rest += piece
        whole = len(rest) - len(rest) % 3
        yield base64.b64encode(rest[:whole])
        rest = rest[whole:]
    yield base64.b64encode(rest) + b'"}'
