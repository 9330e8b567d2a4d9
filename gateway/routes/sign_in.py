"""`/auth`: sign in and out with a browser, and see who is signed in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from gateway.audit.actions import SESSION_BEGIN, SESSION_END
from gateway.audit.audit_log import AuditLog
from gateway.audit.events import actor_of
from gateway.audit.route import AuditedRoute
from gateway.dependencies import KeyAdmin, Parts, PartsDep, require_key
from gateway.http.asgi import SESSION, request_id_of
from gateway.http.request_body import read_form
from gateway.landing_page import wants_json
from gateway.people import pages
from gateway.people.browser import CONSOLE, HOME, local_target
from gateway.people.sessions import csrf_token
from gateway.people.sign_in import SignedIn
from schemas.audit import REFUSED_STATUSES
from schemas.errors import AuthenticationFailed, NexusError

pages_router = APIRouter(include_in_schema=False)
"""The pages of the sign-in, for browsers."""
router = APIRouter(tags=["people"])
links_router = APIRouter(tags=["people"], route_class=AuditedRoute)

PROVIDER_URL = "/auth/login?with=openid"
NOT_SIGNED_IN = "Nobody is signed in. Open /auth/login to sign in."


@pages_router.get("/auth/login")
async def login(
    request: Request,
    parts: PartsDep,
    way: Annotated[str, Query(alias="with")] = "",
    target: Annotated[str, Query(alias="next")] = CONSOLE,
) -> Response:
    """Show the ways to sign in, as a page or as JSON, or with `with=openid` go to the identity provider."""
    people = parts.people
    if way != "openid":
        name = people.provider_name if people.sign_in.has_provider else None
        if wants_json(request.scope["headers"]):
            provider = None if name is None else {"name": name, "url": PROVIDER_URL}
            return JSONResponse({"object": "sign_in", "key": True, "provider": provider})
        return _page(pages.login_page(local_target(target), name))
    try:
        url, pending = await people.sign_in.start(target)
    except NexusError as error:
        return _error(request, error)
    answer = RedirectResponse(url, 302, {"cache-control": "no-store"})
    answer.headers.append("set-cookie", people.sign_in.pending.set(pending, secure=_is_secure(request, parts)))
    return answer


@pages_router.post("/auth/login")
async def login_with_key(request: Request, parts: PartsDep) -> Response:
    """Sign in with an API key, from the form of the page."""
    try:
        parts.people.origin.require_same(request.scope)
        form = await read_form(request)
        signed_in = await parts.people.sign_in.with_key(request.scope, form.get("key", ""), form.get("next", CONSOLE))
    except NexusError as error:
        return _error(request, error)
    return await _begin(request, parts, signed_in)


@pages_router.get("/auth/callback")
async def callback(
    request: Request,
    parts: PartsDep,
    state: Annotated[str, Query(max_length=200)] = "",
    code: Annotated[str, Query(max_length=4096)] = "",
    iss: Annotated[str, Query(max_length=2048)] = "",
    error: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Sign in the person whom the identity provider sends back."""
    sign_in, secure = parts.people.sign_in, _is_secure(request, parts)
    try:
        if error or not code:
            raise AuthenticationFailed("The identity provider did not sign you in. Start again.", code="sign_in_failed")
        signed_in = await sign_in.finish(request.scope, state=state, code=code, issuer=iss)
    except NexusError as failure:
        _record_refusal(request, failure)
        return _error(request, failure)
    answer = await _begin(request, parts, signed_in)
    answer.headers.append("set-cookie", sign_in.pending.set("", secure=secure))
    return answer


@pages_router.get("/auth/link")
async def show_link(token: Annotated[str, Query(max_length=1000)] = "") -> Response:
    """Show the button that uses a sign-in link."""
    return _page(pages.link_page(token))


@pages_router.post("/auth/link")
async def use_link(request: Request, parts: PartsDep) -> Response:
    """Sign in with a link."""
    try:
        parts.people.origin.require_same(request.scope)
        signed_in = await parts.people.sign_in.with_link((await read_form(request)).get("token", ""))
    except NexusError as error:
        _record_refusal(request, error)
        return _error(request, error)
    return await _begin(request, parts, signed_in)


@router.get("/auth/session")
async def get_session(request: Request, parts: PartsDep) -> dict[str, Any]:
    """Return who is signed in, and the token for unsafe requests."""
    if request.scope.get(SESSION) is None:
        raise AuthenticationFailed(NOT_SIGNED_IN, code="not_signed_in")
    caller = require_key(request)
    return {
        "object": "session",
        "name": caller.name,
        "role": caller.role,
        "team": caller.owner,
        "person": caller.person or None,
        "key": None if caller.role is not None else caller.key_id,
        "scopes": sorted(caller.scopes),
        "csrf_token": csrf_token(parts.people.gate.secret(request.scope)),
    }


@router.post("/auth/logout")
async def logout(request: Request, parts: PartsDep) -> Response:
    """End the session. The answer names where to sign out at the identity provider too, if that is possible."""
    if request.scope.get(SESSION) is None:
        raise AuthenticationFailed(NOT_SIGNED_IN, code="not_signed_in")
    people = parts.people
    caller = require_key(request)
    await people.sessions.end(people.gate.secret(request.scope))
    there = people.sign_in.provider_sign_out_url(people.origin.base(request.scope) + HOME) if caller.role else None
    answer = JSONResponse({"object": "session", "deleted": True, "provider_url": there})
    answer.headers["set-cookie"] = people.gate.cookie.set("", secure=_is_secure(request, parts))
    if (log := _audit_log(request)) is not None:
        log.record(SESSION_END, request.scope, actor=actor_of(caller))
    return answer


@links_router.post("/v1/login-links", status_code=201)
async def create_login_link(request: Request, parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """Make a link that signs in once, with the rights of the key that makes it."""
    token, expires_at = parts.people.sign_in.make_link(request.scope["headers"])
    url = f"{parts.people.origin.base(request.scope)}/auth/link?token={token}"
    return {"object": "login_link", "url": url, "expires_at": expires_at}


async def _begin(request: Request, parts: Parts, signed_in: SignedIn) -> Response:
    """Send the browser on with its new session, in place of the one that it had."""
    gate = parts.people.gate
    if former := gate.secret(request.scope):
        await parts.people.sessions.end(former)
    answer = RedirectResponse(signed_in.target, 303, {"cache-control": "no-store"})
    answer.headers["set-cookie"] = gate.cookie.set(signed_in.secret, secure=_is_secure(request, parts))
    if (log := _audit_log(request)) is not None:
        log.record(SESSION_BEGIN, request.scope, actor=signed_in.actor, status=303, details={"route": request.url.path})
    return answer


def _record_refusal(request: Request, error: NexusError) -> None:
    """Record a sign-in that was refused. That of a wrong key is recorded where the key is."""
    log = _audit_log(request)
    if log is not None and error.info.status in REFUSED_STATUSES:
        log.record_refusal(request.scope, error, action=SESSION_BEGIN)


def _audit_log(request: Request) -> AuditLog | None:
    log: AuditLog | None = request.app.state.audit
    return log


def _is_secure(request: Request, parts: Parts) -> bool:
    return parts.people.origin.is_secure(request.scope)


def _page(html: str, status: int = 200) -> HTMLResponse:
    return HTMLResponse(html, status, pages.HEADERS)


def _error(request: Request, error: NexusError) -> Response:
    """Return an error as a page, or as JSON if the caller prefers that."""
    info = error.info
    if wants_json(request.scope["headers"]):
        return JSONResponse(info.body(), info.status, info.headers())
    answer = _page(pages.error_page(info.public_message, request_id_of(request.scope)), info.status)
    answer.headers.update(info.headers())
    return answer
