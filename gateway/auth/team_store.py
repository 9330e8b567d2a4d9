"""Create, list, change and delete teams. A team without a record exists as long as it has a key, with the default limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from gateway import clock
from gateway.auth.authenticator import BOOTSTRAP_OWNER
from gateway.auth.key_store import KeyStore, new_webhook_secret
from schemas.errors import InvalidRequest, NotFound
from schemas.keys import ApiKey, Team

log = structlog.get_logger(__name__)

MAX_TEAMS = 10_000


class TeamNotFound(NotFound):
    """There is no such team."""

    code = "team_not_found"


class TeamStore:
    """Changes the teams whose keys a `KeyStore` holds. Every method raises Unavailable while the store is unavailable."""

    def __init__(self, keys: KeyStore, clock: Callable[[], float] = clock.now) -> None:
        self._keys = keys
        self._clock = clock

    async def create(self, team_id: str, *, expires_at: int | None = None, **fields: Any) -> Team:
        """Create a team, with a webhook secret if it has a webhook. `fields`: its weight, and those of `AccessLimits`. Raises InvalidRequest if there is one of that id."""
        teams = await self._all()
        if team_id in teams:
            raise InvalidRequest(f"There is a team '{team_id}' already. Change it with PATCH /v1/teams/….", param="id")
        if len(teams) >= MAX_TEAMS:
            raise InvalidRequest(f"There are {MAX_TEAMS} teams, the most that are possible. Delete some first.")
        team = await self._put(Team(id=team_id, created_at=int(self._clock()), expires_at=expires_at, **fields))
        log.info("teams.created", team=team_id)
        return team

    async def list_all(self) -> list[Team]:
        """Return all teams, sorted by id."""
        return sorted((await self._all()).values(), key=lambda team: team.id)

    async def get(self, team_id: str) -> Team:
        """Return a team. Raises TeamNotFound."""
        team = (await self._all()).get(team_id)
        if team is None:
            raise TeamNotFound(f"There is no team '{team_id[:100]}'. GET /v1/teams lists all teams.")
        return team

    async def change(self, team_id: str, **changes: Any) -> Team:
        """Change a team's end, weight or limits. A webhook where it had none brings a new webhook secret. Raises TeamNotFound."""
        team = await self._put((await self.get(team_id)).model_copy(update=changes))
        log.info("teams.changed", team=team_id, fields=sorted(changes))
        return team

    async def delete(self, team_id: str) -> None:
        """Delete a team that has neither keys nor people. Raises TeamNotFound, InvalidRequest."""
        team = await self.get(team_id)
        keys = await self.keys_of(team_id)
        if keys or team_id == BOOTSTRAP_OWNER:
            held_by = f"{len(keys)} keys" if keys else "the bootstrap key"
            raise InvalidRequest(f"The team has {held_by}. Revoke its keys first.", code="team_has_keys")
        if people := sum(person.team == team_id for person in self._keys.people.all()):
            raise InvalidRequest(f"The team has {people} people. Give them another team first.", code="team_has_people")
        await self._put(team.model_copy(update={"deleted_at": int(self._clock())}))
        log.info("teams.deleted", team=team_id)

    async def keys_of(self, team_id: str) -> list[ApiKey]:
        """Return the keys of a team that are not revoked."""
        return [key for key in await self._keys.list_active() if key.owner == team_id]

    async def _all(self) -> dict[str, Team]:
        """Return all teams: those with a record, and those that exist because of a key or a person."""
        found = {BOOTSTRAP_OWNER: Team(id=BOOTSTRAP_OWNER, created_at=0)}
        for key in reversed(await self._keys.list_active()):
            found.setdefault(key.owner, Team(id=key.owner, created_at=key.created_at))
        for person in self._keys.people.all():
            found.setdefault(person.team, Team(id=person.team, created_at=person.created_at))
        return found | {team.id: team for team in self._keys.teams.all() if team.deleted_at is None}

    async def _put(self, team: Team) -> Team:
        known = self._keys.teams.get(team.id)
        version = max(team.version, known.version if known is not None else 0) + 1
        secret = (team.webhook_secret or new_webhook_secret()) if team.budget_webhook else ""
        team = team.model_copy(update={"version": version, "webhook_secret": secret})
        await self._keys.teams.put(team)
        self._keys.publish()
        return team
