"""Resolve the limits of a key and its team into the checks that requests meet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal, NamedTuple

from backbone.store.store import JobLimit
from gateway.http.client_addresses import AddressSet
from schemas.budgets import Budget
from schemas.errors import InvalidRequest, PermissionDenied
from schemas.inspection import Inspection
from schemas.jobs import Lane
from schemas.keys import AccessLimits


class Bound(NamedTuple):
    """A limit on something that is counted under a name: of a key, or of a team."""

    name: str
    most: int


class Rate(NamedTuple):
    """A limit per minute on something that is counted under a name."""

    name: str
    per_minute: int


class AssignedBudget(NamedTuple):
    """A budget of a key or of a team."""

    holder: Literal["key", "team"]
    holder_id: str
    budget: Budget
    webhook: str
    """The URL that receives its warnings; empty: none does."""

    @property
    def name(self) -> str:
        """Return the name under which the budget is counted."""
        return f"{self.holder}:{self.holder_id}:{self.budget.unit}:{self.budget.period}"


@dataclass(frozen=True, slots=True)
class EffectiveLimits:
    """The limits of one key and its team. Each tuple holds the key's own limit and the team's, where they are set."""

    models: tuple[re.Pattern[str], ...] = ()
    """A model's name must match each of them."""
    lanes: frozenset[str] | None = None
    networks: tuple[AddressSet, ...] = ()
    """A caller's address must be in each of them."""
    requests: tuple[Rate, ...] = ()
    tokens: tuple[Rate, ...] = ()
    open: tuple[Bound, ...] = ()
    queued: JobLimit | None = None
    running: JobLimit | None = None
    stored_bytes: int | None = None
    """Bytes of the team's files."""
    pending_bytes: int | None = None
    """Bytes of the team's large request bodies whose requests and jobs have not ended."""
    result_bytes: int | None = None
    """Bytes of each kind of the team's stored results."""
    batches: int | None = None
    """Unfinished batches of the team."""
    webhooks: tuple[Bound, ...] = ()
    budgets: tuple[AssignedBudget, ...] = ()

    retain_none: bool = False
    """Nothing is kept of requests and answers once the answer was delivered."""
    inspection: Inspection | None = None
    """What administrators inspect of the team's requests; it may have ended."""
    is_rated: bool = False
    """Whether requests or tokens are limited per minute."""

    def require_network(self, address: str) -> None:
        """Raise PermissionDenied if requests from this address are not allowed. `address`: as `client_addresses.group_of` returns it."""
        if any(address not in networks for networks in self.networks):
            raise PermissionDenied(
                "This API key cannot be used from your address. Ask the operator of this gateway to allow your network.",
                code="network_not_allowed",
            )

    def allows_model(self, name: str) -> bool:
        """Return whether requests may name this model or alias."""
        return all(pattern.fullmatch(name) for pattern in self.models)

    def require_model(self, name: str) -> None:
        """Raise PermissionDenied if requests may not name this model."""
        if not self.allows_model(name):
            raise PermissionDenied(
                f"This API key cannot use the model '{name[:100]}'. GET /v1/models lists the models that it can use.",
                code="model_not_allowed",
                param="model",
            )

    def require_lane(self, lane: Lane) -> None:
        """Raise PermissionDenied if requests may not use this lane."""
        if self.lanes is not None and lane not in self.lanes:
            raise PermissionDenied(
                f"This API key cannot use the lane '{lane}'. It can use: {', '.join(sorted(self.lanes))}. "
                "Change 'service_tier', or ask the operator of this gateway.",
                code="lane_not_allowed",
                param="service_tier",
            )

    def require_retention(self, advice: str, param: str | None = None) -> None:
        """Raise InvalidRequest if nothing may be kept of requests and answers. `advice` says what to do instead."""
        if self.retain_none:
            raise InvalidRequest(
                f"Nothing is kept of your team's requests and answers (`retain: none`), which this request needs. {advice}",
                code="retention_not_allowed",
                param=param,
            )


NO_LIMITS = EffectiveLimits()


def resolve_limits(
    key: AccessLimits, key_id: str, team: AccessLimits, team_id: str, inspection: Inspection | None = None
) -> EffectiveLimits:
    """Return the limits that hold for a key: its own, and its team's. Nothing is inspected where nothing is kept."""
    both = (key, team)
    lanes = [frozenset(limits.lanes) for limits in both if limits.lanes is not None]
    key_name, team_name = f"key:{key_id}", f"team:{team_id}"

    def bounds(field: str) -> tuple[Bound, ...]:
        values = ((key_name, getattr(key, field)), (team_name, getattr(team, field)))
        return tuple(Bound(name, most) for name, most in values if most is not None)

    open_bounds = bounds("max_open")
    if key.max_open is None and key.max_queued is not None and key.max_running is not None:
        open_bounds = (Bound(key_name, key.max_queued + key.max_running), *open_bounds)
    requests, tokens = bounds("requests_per_minute"), bounds("tokens_per_minute")
    return EffectiveLimits(
        is_rated=bool(requests or tokens),
        models=tuple(_one_of(limits.models) for limits in both if limits.models is not None),
        lanes=frozenset.intersection(*lanes) if lanes else None,
        networks=tuple(AddressSet(",".join(limits.networks)) for limits in both if limits.networks is not None),
        requests=tuple(Rate(*bound) for bound in requests),
        tokens=tuple(Rate(*bound) for bound in tokens),
        open=open_bounds,
        queued=_job_limit(key.max_queued, team.max_queued),
        running=_job_limit(key.max_running, team.max_running),
        stored_bytes=_stricter(key.max_stored_bytes, team.max_stored_bytes),
        pending_bytes=_stricter(key.max_pending_bytes, team.max_pending_bytes),
        result_bytes=_stricter(key.max_result_bytes, team.max_result_bytes),
        batches=_stricter(key.max_batches, team.max_batches),
        webhooks=bounds("max_webhooks"),
        retain_none="none" in (key.retain, team.retain),
        inspection=inspection if "none" not in (key.retain, team.retain) else None,
        budgets=(*assigned_budgets("key", key_id, key), *assigned_budgets("team", team_id, team)),
    )


def assigned_budgets(
    holder: Literal["key", "team"], holder_id: str, limits: AccessLimits
) -> tuple[AssignedBudget, ...]:
    """Return the budgets of one key, or of one team."""
    webhook = limits.budget_webhook or ""
    return tuple(AssignedBudget(holder, holder_id, budget, webhook) for budget in limits.budgets or ())


def _stricter(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _job_limit(key: int | None, team: int | None) -> JobLimit | None:
    return None if key is None and team is None else JobLimit(key, team)


def _one_of(globs: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern of the names that match any of the globs; only `*` and `?` are special."""
    return re.compile("|".join(translate(glob.replace("[", "[[]")) for glob in globs))
