"""`/v1/messages/batches`: Anthropic's Message Batches, as batches of Nexus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from gateway.batches.input_file import split_lines
from gateway.dependencies import JobsCaller, Parts, PartsDep
from gateway.dialects.anthropic.endpoint import MESSAGES_PATH
from gateway.dialects.anthropic.message_batches import (
    WINDOW,
    input_lines,
    message_batch,
    own_id,
    result_line,
    shown_id,
    unread_result_line,
)
from gateway.dialects.anthropic.pages import AFTER, BEFORE, page_object, read_query
from gateway.http.request_body import CallerDisconnected, parse_body
from gateway.signed_urls import base_url
from schemas.anthropic.batches import MessageBatchRequest
from schemas.batches import Batch, BatchRequest
from schemas.errors import InvalidRequest, NotFound
from schemas.files import BATCH_PURPOSE

router = APIRouter(tags=["messages"])

MAX_LINE_BYTES = 128 * 1024 * 1024
"""The longest line of results: an answer may have half of it."""
LINES_PER_TURN = 64
"""Lines after which other tasks get their turn."""
JSONL = "application/x-jsonl"


@router.post("/v1/messages/batches")
async def create_message_batch(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Create a batch of messages."""
    caller.limits.require_retention("Send the requests on their own.")
    await parts.budgets.require_some(caller.limits)
    with parts.reader.memory.share(caller.owner) as share:
        try:
            body = await parts.reader.read_body(request.scope["headers"], request.receive, share, has_arrived=False)
        except CallerDisconnected:
            raise InvalidRequest("The request's body is not complete: the connection was closed.") from None
        wanted = parse_body(body, MessageBatchRequest)
        del body
        total = len(wanted.requests)
        file = await parts.files.write(
            caller.owner,
            _in_turns(input_lines(wanted)),
            filename="message_batch.jsonl",
            purpose=BATCH_PURPOSE,
            content_type=JSONL,
            max_stored_bytes=caller.limits.stored_bytes,
        )
    base = base_url(request.scope)
    batch_request = BatchRequest(input_file_id=file.id, endpoint=MESSAGES_PATH, completion_window=WINDOW)
    try:
        return message_batch(await parts.batches.create(caller, batch_request, base, total=total), base)
    except BaseException:
        await parts.files.remove(caller.owner, file.id)
        raise


@router.get("/v1/messages/batches")
async def list_message_batches(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """List the caller's batches of messages, newest first."""
    wanted = read_query(request.query_params)
    for name in (AFTER, BEFORE):
        if (cursor := request.query_params.get(name)) is not None and not own_id(cursor):
            raise InvalidRequest(f"'{cursor[:100]}' is not the id of a batch: '{name}'", param=name)
    found, more = await parts.batches.page(
        caller.owner,
        after=own_id(wanted.before or wanted.after),
        limit=wanted.limit,
        endpoint=MESSAGES_PATH,
        newest_first=not wanted.before,
    )
    if wanted.before:
        found.reverse()
    base = base_url(request.scope)
    return page_object([message_batch(batch, base) for batch in found], more=more)


@router.get("/v1/messages/batches/{message_batch_id}")
async def get_message_batch(
    message_batch_id: str, request: Request, parts: PartsDep, caller: JobsCaller
) -> dict[str, Any]:
    """Return a batch of messages."""
    return message_batch(await _find(parts, caller.owner, message_batch_id), base_url(request.scope))


@router.get("/v1/messages/batches/{message_batch_id}/results")
async def get_message_batch_results(message_batch_id: str, parts: PartsDep, caller: JobsCaller) -> StreamingResponse:
    """Return the results, one on each line."""
    batch = await _find(parts, caller.owner, message_batch_id)
    if not batch.is_final:
        raise InvalidRequest("The batch has not ended, so it has no results. Retry later.", code="batch_not_ended")
    lines = _results(parts, batch)
    first = await anext(lines, b"")  # a failure here can still be sent as an error
    return StreamingResponse(_resume(first, lines), media_type=JSONL)


@router.post("/v1/messages/batches/{message_batch_id}/cancel")
async def cancel_message_batch(
    message_batch_id: str, request: Request, parts: PartsDep, caller: JobsCaller
) -> dict[str, Any]:
    """Cancel a batch of messages. The results hold the messages that are complete by then."""
    batch = await _find(parts, caller.owner, message_batch_id)
    return message_batch(await parts.batches.cancel(caller.owner, batch.id), base_url(request.scope))


@router.delete("/v1/messages/batches/{message_batch_id}")
async def delete_message_batch(message_batch_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Delete a batch of messages that has ended, with its results."""
    batch = await _find(parts, caller.owner, message_batch_id)
    await parts.batches.delete(caller.owner, batch.id)
    return {"id": shown_id(batch.id), "type": "message_batch_deleted"}


async def _find(parts: Parts, owner: str, message_batch_id: str) -> Batch:
    """Return a batch of messages. Raises NotFound."""
    missing = NotFound(
        f"Batch '{message_batch_id[:100]}' does not exist. `GET /v1/messages/batches` lists your batches.",
        code="batch_not_found",
    )
    try:
        batch = await parts.batches.get(owner, own_id(message_batch_id))
    except NotFound:
        raise missing from None
    if batch.endpoint != MESSAGES_PATH:
        raise missing
    return batch


async def _results(parts: Parts, batch: Batch) -> AsyncGenerator[bytes, None]:
    """Yield the results' lines. Raises NotFound for files that were deleted."""
    files = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
    for file_id in files or [batch.input_file_id]:
        record = await parts.files.open(batch.owner, file_id)
        async with aclosing(split_lines(parts.files.read(record), MAX_LINE_BYTES)) as lines:
            async for line in lines:
                yield result_line(line.data) if files else unread_result_line(line.data, batch)
                if line.number % LINES_PER_TURN == 0:
                    await asyncio.sleep(0)


async def _resume(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for line in rest:
            yield line


async def _in_turns(lines: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    for number, line in enumerate(lines):
        yield line
        if number % LINES_PER_TURN == 0:
            await asyncio.sleep(0)
