"""`/`: a page that explains Nexus and how to call it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from gateway.dependencies import PartsDep
from gateway.landing_page import CONTENT_SECURITY_POLICY, LandingPage, wants_json

router = APIRouter(include_in_schema=False)

HEADERS = {"cache-control": "no-store", "vary": "accept"}


@router.api_route("/", methods=["GET", "HEAD"])
async def welcome(request: Request, parts: PartsDep) -> Response:
    """Return a page for browsers, or JSON if requested. The status is always 200; probes use `/readyz`."""
    found: LandingPage = request.app.state.landing_page
    ready = (await parts.readiness.get()).ok
    if wants_json(request.scope["headers"]):
        return JSONResponse(found.summary(request.scope, ready=ready), headers=HEADERS)
    page = found.page(request.scope, ready=ready)
    return HTMLResponse(page, headers={**HEADERS, "content-security-policy": CONTENT_SECURITY_POLICY})
