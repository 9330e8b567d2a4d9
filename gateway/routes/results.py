"""`GET /v1/results/{name}`: what a caller asked for by URL. The URL itself is the permission."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from gateway.dependencies import PartsDep
from schemas.errors import NotFound

router = APIRouter(tags=["results"])

SHOWN = ("image/", "audio/", "video/")
"""Content types that a browser may show; it saves all others, so that no page of a stranger runs under our name."""


@router.get("/v1/results/{name}")
async def get_result(
    name: str,
    parts: PartsDep,
    owner: Annotated[str, Query()] = "",
    expires: Annotated[int, Query()] = 0,
    signature: Annotated[str, Query()] = "",
) -> StreamingResponse:
    """A picture or a sound, while its URL is valid."""
    parts.url_signer.verify(name, owner, expires, signature)
    info = await parts.blobs.info(name)
    if info is None or info.owner != owner:
        raise NotFound("this result is not kept any more; ask for it again")
    headers = {
        "content-length": str(info.size),
        "cache-control": "private, max-age=3600, immutable",
        "content-security-policy": "default-src 'none'; sandbox",
    }
    if not info.content_type.startswith(SHOWN):
        headers["content-disposition"] = "attachment"
    return StreamingResponse(parts.blobs.read(name), media_type=info.content_type, headers=headers)
