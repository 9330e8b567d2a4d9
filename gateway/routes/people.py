"""`/v1/people`: list the people who signed in, change their roles and teams, disable them, end their sessions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway import clock
from gateway.audit.route import AuditedRoute
from gateway.auth.authenticator import Principal
from gateway.dependencies import AuditDep, KeyAdmin, Parts, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.operator_requests import PersonUpdate
from schemas.errors import InvalidRequest
from schemas.people import ROLE_SCOPES, Person, Role

router = APIRouter(tags=["people"], route_class=AuditedRoute)


@router.get("/v1/people")
async def list_people(parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """List everybody who has signed in with the identity provider."""
    return {"object": "list", "data": [_person_object(person) for person in await parts.people.store.list_all()]}


@router.get("/v1/people/{person_id}")
async def get_person(person_id: str, parts: PartsDep, _: KeyAdmin) -> dict[str, Any]:
    """Return one person."""
    return await _described(parts, await parts.people.store.get(person_id))


@router.patch("/v1/people/{person_id}")
async def change_person(
    person_id: str, request: Request, parts: PartsDep, caller: KeyAdmin, audit: AuditDep
) -> dict[str, Any]:
    """Change a person's role or team, or disable the person."""
    body = await read_json(request, PersonUpdate)
    changes: dict[str, Any] = {}
    if "role" in body.model_fields_set:
        changes["set_role"] = body.role
        _require_power_over(caller, body.role)
    if "team" in body.model_fields_set:
        changes["set_team"] = None if body.team is None else check_name(body.team, "a team's id", "team")
    if body.keys == "revoke" and not body.disabled:
        raise InvalidRequest("Keys are revoked only of a person who is disabled: set 'disabled' to true.", param="keys")
    if body.disabled is not None:
        changes["disabled_at"] = int(clock.now()) if body.disabled else None
    person = await parts.people.store.get(person_id)
    _require_power_over(caller, person.role, person.group_role)
    changed = await parts.people.store.change(person_id, **changes)
    audit.target_team = changed.team
    audit.compare(_audited_person(person), _audited_person(changed))
    if body.disabled:
        changed = await parts.people.store.end_sessions(person_id)
    if body.keys == "revoke":
        audit.details["revoked_keys"] = await _revoke_keys(parts, person_id)
    return await _described(parts, changed)


@router.delete("/v1/people/{person_id}/sessions")
async def end_sessions(person_id: str, parts: PartsDep, caller: KeyAdmin) -> dict[str, Any]:
    """End all sessions of a person, and the calls that are open in them."""
    person = await parts.people.store.get(person_id)
    _require_power_over(caller, person.role)
    return await _described(parts, await parts.people.store.end_sessions(person_id))


def _audited_person(person: Person) -> dict[str, Any]:
    return {"role": person.role, "team": person.team, "disabled_at": person.disabled_at}


async def _revoke_keys(parts: Parts, person_id: str) -> list[str]:
    """Revoke the keys that a person made, and return their ids."""
    ids = [key.id for key in await parts.keys.list_active() if key.person == person_id]
    for key_id in ids:
        await parts.keys.revoke(key_id)
    return ids


def _require_power_over(caller: Principal, *roles: Role | None) -> None:
    """Raise PermissionDenied unless the caller has every administrative scope of these roles."""
    for role in roles:
        if role is not None:
            caller.require_power_over(ROLE_SCOPES[role])


async def _described(parts: Parts, person: Person) -> dict[str, Any]:
    return _person_object(person) | {"sessions": await parts.people.store.count_sessions(person.id)}


def _person_object(person: Person) -> dict[str, Any]:
    return {
        "id": person.id,
        "object": "person",
        "name": person.name,
        "email": person.email,
        "issuer": person.issuer,
        "subject": person.subject,
        "role": person.role,
        "team": person.team,
        "role_from": "administrator" if person.set_role is not None else "groups",
        "team_from": "administrator" if person.set_team is not None else "groups",
        "status": "active" if person.disabled_at is None else "disabled",
        "created_at": person.created_at,
        "signed_in_at": person.signed_in_at,
    }
