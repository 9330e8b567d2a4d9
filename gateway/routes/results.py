"""`GET /v1/results/{name}`: results by signed URL. The URL is the permission."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from gateway.dependencies import PartsDep
from schemas.errors import NotFound

router = APIRouter(tags=["results"])

DISPLAYABLE_TYPES = ("image/", "audio/", "video/")
"""Content types that browsers may display. They download all others, so that no foreign page runs in the API's origin."""


@router.get("/v1/results/{name}")
async def get_result(
    name: str,
    parts: PartsDep,
    owner: Annotated[str, Query()] = "",
    expires: Annotated[int, Query()] = 0,
    signature: Annotated[str, Query()] = "",
    key: Annotated[str, Query()] = "",
) -> StreamingResponse:
    """Return an image or audio file while its URL is valid."""
    parts.url_signer.verify(name, owner, expires, signature, key)
    info = await parts.blobs.info(name)
    if info is None or info.owner != owner:
        raise NotFound("The result has been deleted after its retention time. Send the original request again.")
    headers = {
        "content-length": str(info.size),
        "cache-control": "private, max-age=3600, immutable",
        "content-security-policy": "default-src 'none'; sandbox",
    }
    if not info.content_type.startswith(DISPLAYABLE_TYPES):
        headers["content-disposition"] = "attachment"
    return StreamingResponse(parts.blobs.read(name), media_type=info.content_type, headers=headers)
