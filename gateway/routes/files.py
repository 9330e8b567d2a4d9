"""`/v1/files`: OpenAI's Files API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from gateway.dependencies import JobsCaller, PartsDep
from gateway.pagination import list_object

router = APIRouter(tags=["files"])

MAX_PAGE_SIZE = 10_000


@router.post("/v1/files")
async def upload_file(request: Request, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Store a file for `FILE_KEEP_S` seconds, or for the time in `expires_after`."""
    headers = request.scope["headers"]
    caller.limits.require_retention("Send files with the requests that use them.")
    most = caller.limits.stored_bytes
    return (await parts.files.upload(caller.owner, headers, request.receive, most)).to_openai()


@router.get("/v1/files")
async def list_files(
    parts: PartsDep,
    caller: JobsCaller,
    after: Annotated[str, Query(max_length=100)] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)] = MAX_PAGE_SIZE,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str, Query(max_length=100)] = "",
) -> dict[str, Any]:
    """List the caller's files."""
    found, more = await parts.files.page(
        caller.owner, after=after, limit=limit, newest_first=order == "desc", purpose=purpose
    )
    return list_object(found, more)


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Return a file's record."""
    return (await parts.files.open(caller.owner, file_id)).to_openai()


@router.get("/v1/files/{file_id}/content")
async def get_content(file_id: str, parts: PartsDep, caller: JobsCaller) -> StreamingResponse:
    """Return a file's bytes as uploaded."""
    record = await parts.files.open(caller.owner, file_id)
    pieces = parts.files.read(record)
    first = await anext(pieces, b"")  # a failure here can still be sent as an error
    headers = {
        "content-length": str(record.size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
    }
    return StreamingResponse(_resume(first, pieces), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, parts: PartsDep, caller: JobsCaller) -> dict[str, Any]:
    """Delete a file."""
    await parts.files.remove(caller.owner, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


async def _resume(first: bytes, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece
