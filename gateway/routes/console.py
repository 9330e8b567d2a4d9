"""`/ui`: the console, a page that uses the API with the session of the person who looks at it. Its files are public."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from gateway.console.files import ConsoleFiles
from gateway.people.pages import HEADERS as PAGE_HEADERS
from gateway.people.pages import message_page
from schemas.errors import NotFound

router = APIRouter(include_in_schema=False)

NOT_BUILT = """<p>This Nexus was installed from its source, and the console was not built. Run this beside the Makefile, then reload the page:</p>
<p><code>make console</code></p>
<p>It needs the npm registry once. Everything else of Nexus works without.</p>"""


@router.get("/ui")
async def enter(request: Request) -> Response:
    """Send browsers to the console's first page."""
    query = request.scope["query_string"].decode("latin-1")
    return RedirectResponse(f"/ui/?{query}" if query else "/ui/", 308)


@router.get("/ui/{path:path}")
async def serve(path: str, request: Request) -> Response:
    """Return a file of the console; for the path of a screen, the page."""
    files: ConsoleFiles = request.app.state.console
    if not files.is_built:
        return HTMLResponse(message_page("No console yet", NOT_BUILT), 503, PAGE_HEADERS)
    found = files.find(path)
    if found is None:
        raise NotFound(f"The console has no file '{path[:100]}'. Reload the page: a new version may be installed.")
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.compressed, headers={**found.headers, "content-encoding": "gzip"})
    return Response(found.content, headers=dict(found.headers))
