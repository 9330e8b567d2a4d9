"""`/docs`, a documentation page without resources from other servers, and `/openapi.json`."""

from __future__ import annotations

from importlib.resources import files
from urllib.parse import urlsplit

import fastapi_offline
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from gateway.openapi import ApiDocument

router = APIRouter(include_in_schema=False)

ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
"""The files of Swagger UI that the page loads."""
CACHE_HEADERS = {"cache-control": "private, max-age=86400"}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Nexus</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/page.js"></script>
</body>
</html>
"""
SCRIPT = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null, docExpansion: "list",
  persistAuthorization: false, presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout",
});
"""


@router.get("/docs")
async def page(request: Request) -> HTMLResponse:
    """Return a page with Swagger UI for `/openapi.json`."""
    return HTMLResponse(PAGE, headers={"content-security-policy": _policy(_document(request).server(request.scope))})


@router.get("/docs/page.js")
async def script() -> Response:
    """Return the page's script, since the content security policy forbids inline scripts."""
    return Response(SCRIPT, media_type="text/javascript", headers=CACHE_HEADERS)


@router.get("/docs/swagger-ui-bundle.js")
async def bundle() -> Response:
    """Return Swagger UI's script."""
    return _asset("swagger-ui-bundle.js")


@router.get("/docs/swagger-ui.css")
async def styles() -> Response:
    """Return Swagger UI's styles."""
    return _asset("swagger-ui.css")


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(await _document(request).of(request.scope), media_type="application/json")


def _document(request: Request) -> ApiDocument:
    document: ApiDocument = request.app.state.document
    return document


def _asset(name: str) -> Response:
    data = (files(fastapi_offline) / "static" / name).read_bytes()
    return Response(data, media_type=ASSETS[name], headers=CACHE_HEADERS)


def _policy(server: str) -> str:
    """Return a content security policy that allows only resources of this server and requests to the API."""
    url = urlsplit(server)
    api = f" {url.scheme}://{url.netloc}" if url.netloc else ""
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self' 'unsafe-inline'",  # Swagger UI sets inline styles
            "img-src 'self' data:",
            f"connect-src 'self'{api}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
