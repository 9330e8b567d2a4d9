"""Bodies of operators' requests: API keys, teams, aliases and services."""

from __future__ import annotations

import math
from ipaddress import IPv6Network, ip_network
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.http.client_addresses import PREFIX_V6
from gateway.http.request_body import Name
from schemas.budgets import Budget, BudgetPeriod, BudgetUnit
from schemas.errors import InvalidRequest
from schemas.inspection import MAX_INSPECTION_S, MAX_PATTERNS, MAX_REQUESTS, RedactPattern
from schemas.keys import LIMITS, MAX_WEIGHT, LaneName, Retain, Scope
from schemas.people import Role
from schemas.submission import PUBLIC_URL

MAX_LIFETIME_S = 10 * 365 * 86_400
MAX_EXPIRES_AT = 2**40
MAX_JOBS = 1_000_000
MAX_TOKENS = 10**9
MAX_BYTES = 2**50
MIN_RESULT_BYTES = 1024 * 1024
MAX_AMOUNT = 10**12
MAX_BUDGETS = len(BudgetUnit) * len(BudgetPeriod)
MAX_OVERLAP_S = 30 * 86_400
MAX_STARS = 8
MAX_PATTERN_STARS = 2
MIN_PATTERN = 3
HTTP_URL = r"^https?://[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?(:[1-9][0-9]{1,3})?(/[!-~]*)?$"
"""Usual form of a URL, for the OpenAPI document alone: other forms are accepted too, such as an address in brackets."""

Count = Annotated[int, Field(strict=True, le=MAX_JOBS)]


def _check_glob(glob: str) -> str:
    if glob.count("*") > MAX_STARS or not glob.isprintable():
        raise PydanticCustomError("glob", "must be printable, with at most {stars} '*'", {"stars": MAX_STARS})
    return glob


def _check_network(text: str) -> str:
    try:
        network = ip_network(text.strip(), strict=False)
    except ValueError:
        raise PydanticCustomError("network", "must be an IP address or a range of them in CIDR notation") from None
    if isinstance(network, IPv6Network) and network.prefixlen > PREFIX_V6 and not network.is_loopback:
        raise PydanticCustomError("network", "must be a /64 or a larger range: callers share their /64")
    return str(network)


Glob = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_glob)]
Network = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_check_network)]


class BudgetFields(BaseModel):
    """A budget of a key or a team."""

    model_config = ConfigDict(extra="forbid")

    unit: BudgetUnit
    """What is counted: tokens of prompts and answers, seconds for which slots of workers are taken, or cost by the price list."""
    amount: Annotated[float, Field(strict=True, gt=0, le=MAX_AMOUNT, allow_inf_nan=False)]
    """Tokens, seconds, or units of the price list's currency."""
    period: BudgetPeriod
    """The calendar period in UTC after which the budget renews; a week begins on Monday."""
    warn_at: float | None = Field(default=None, strict=True, gt=0, le=1, allow_inf_nan=False)
    """The share of the amount at which `budget_webhook` receives a warning."""

    @field_validator("amount")
    @classmethod
    def _is_whole(cls, amount: float, field: ValidationInfo) -> float:
        if field.data.get("unit") is BudgetUnit.TOKENS and amount != int(amount):
            raise PydanticCustomError("amount", "must be a whole number of tokens")
        return amount

    def budget(self) -> Budget:
        """Return the budget."""
        whole = int(self.amount)
        return Budget(**self.model_dump() | {"amount": whole if whole == self.amount else self.amount})


def _check_budgets(budgets: list[BudgetFields]) -> list[BudgetFields]:
    if len({(one.unit, one.period) for one in budgets}) < len(budgets):
        raise PydanticCustomError("budgets", "may hold one budget for each unit and period")
    return budgets


Budgets = Annotated[list[BudgetFields], Field(max_length=MAX_BUDGETS), AfterValidator(_check_budgets)]


class LimitFields(BaseModel):
    """The limits of a key or a team. Null: no limit of its own; for a team, the default of the settings."""

    model_config = ConfigDict(extra="forbid")

    models: list[Glob] | None = Field(default=None, min_length=1, max_length=100)
    """Patterns of the model names that requests may use: `*` stands for any text, `?` for one character."""
    lanes: list[LaneName] | None = Field(default=None, min_length=1, max_length=3)
    """The lanes that requests may use."""
    requests_per_minute: Annotated[Count, Field(ge=1)] | None = None
    """Requests in any 60 seconds, over all gateways."""
    tokens_per_minute: Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS)] | None = None
    """Tokens of prompts and answers in any 60 seconds, over all gateways."""
    max_open: Annotated[Count, Field(ge=1)] | None = None
    """Requests that may be open at once, at each gateway process."""
    max_queued: Annotated[Count, Field(ge=0)] | None = None
    """Jobs that may wait at once."""
    max_running: Annotated[Count, Field(ge=1)] | None = None
    """Jobs that may run at once. Others wait."""
    max_stored_bytes: Annotated[int, Field(strict=True, ge=0, le=MAX_BYTES)] | None = None
    """Bytes of files that may be stored at once."""
    max_pending_bytes: Annotated[int, Field(strict=True, ge=0, le=MAX_BYTES)] | None = None
    """Bytes of request bodies over 512 KiB that may be stored at once, for requests and jobs that have not ended."""
    max_result_bytes: Annotated[int, Field(strict=True, ge=MIN_RESULT_BYTES, le=MAX_BYTES)] | None = None
    """Bytes of ended jobs, of results by URL, of stored responses, and of unfinished batches' results: each for itself. The oldest are
    deleted above it; lines of batches fail.
    """
    max_batches: Annotated[Count, Field(ge=0)] | None = None
    """Batches that may be unfinished at once."""
    max_webhooks: Annotated[Count, Field(ge=1)] | None = None
    """Webhooks that each gateway process sends at once. Others wait."""
    networks: list[Network] | None = Field(default=None, min_length=1, max_length=100)
    """Addresses and CIDR ranges from which requests may come."""
    retain: Retain | None = None
    """`none`: nothing is kept of requests and answers once the answer was delivered."""
    budgets: Budgets | None = None
    """How much may be used in a day, a week or a month; at most one for each unit and period."""
    budget_webhook: (
        Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra={"pattern": PUBLIC_URL})] | None
    ) = None
    """The URL that receives `budget.warning` and `budget.exhausted`."""

    def limits(self) -> dict[str, Any]:
        """Return the limits that the body sets, null included."""
        return {name: _frozen(getattr(self, name)) for name in LIMITS if name in self.model_fields_set}


def _frozen(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(item.budget() if isinstance(item, BudgetFields) else item for item in value)


class ExpiringFields(LimitFields):
    """Limits, and the time at which they and what they limit end."""

    expires_in: float | None = Field(default=None, strict=True, gt=0, le=MAX_LIFETIME_S)
    """Seconds from now; null: never."""
    expires_at: int | None = Field(default=None, strict=True, le=MAX_EXPIRES_AT)
    """Unix seconds, in place of `expires_in`."""

    def end(self, now: float) -> int | None:
        """Return the time at which the key expires, in Unix seconds; None: never. Raises InvalidRequest."""
        if self.expires_in is not None and self.expires_at is not None:
            raise InvalidRequest("Set either 'expires_in' or 'expires_at', not both.", param="expires_in")
        if self.expires_at is not None and self.expires_at <= now:
            raise InvalidRequest("'expires_at' lies in the past. Set a time in the future.", param="expires_at")
        return math.ceil(now + self.expires_in) if self.expires_in is not None else self.expires_at

    def sets_end(self) -> bool:
        """Return whether the body sets the end, null included."""
        return bool(self.model_fields_set & {"expires_in", "expires_at"})


class NewKey(ExpiringFields):
    """The body of `POST /v1/keys`."""

    name: Name
    owner: Name | None = None
    """The team: owner of the key's jobs, files, batches and responses; keys of one team share them. Default: a new team with
    the key's name."""
    scopes: list[Scope] = Field(default=[Scope.INFERENCE, Scope.JOBS], min_length=1)


class KeyUpdate(ExpiringFields):
    """The body of `PATCH /v1/keys/{key_id}`. Fields that are left out stay; null removes a limit."""

    name: Name | None = None
    scopes: list[Scope] | None = Field(default=None, min_length=1)


class Rotation(BaseModel):
    """The body of `POST /v1/keys/{key_id}/rotate`."""

    model_config = ConfigDict(extra="forbid")

    overlap_s: int = Field(default=86_400, strict=True, ge=0, le=MAX_OVERLAP_S)
    """Seconds for which the replaced key stays valid."""


class PersonUpdate(BaseModel):
    """The body of `PATCH /v1/people/{person_id}`. Fields that are left out stay; null restores what the groups give."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = None
    """The role in place of the one that the person's groups give."""
    team: Name | None = None
    """The team in place of the one that the person's groups give."""
    disabled: bool | None = Field(default=None, strict=True)
    """`true` ends the person's sessions and open calls, and keeps the person out; `false` lets the person in again."""
    keys: Literal["keep", "revoke"] = "keep"
    """What becomes of the API keys that a person made who is disabled: they belong to the team."""


class TeamFields(ExpiringFields):
    """Fields of a team."""

    weight: Annotated[int, Field(strict=True, ge=1, le=MAX_WEIGHT)] | None = None
    """The team's share of a queue, beside the weights of the other teams whose jobs wait there; null: 1."""

    def changes(self) -> dict[str, Any]:
        """Return the limits and the weight that the body sets."""
        return self.limits() | ({"weight": self.weight or 1} if "weight" in self.model_fields_set else {})


class NewTeam(TeamFields):
    """The body of `POST /v1/teams`."""

    id: Name
    """The `owner` of the team's keys."""


class TeamUpdate(TeamFields):
    """The body of `PATCH /v1/teams/{team_id}`. Fields that are left out stay; null restores a default."""


class InspectionStart(BaseModel):
    """The body of `PUT /v1/inspector/teams/{team_id}`."""

    model_config = ConfigDict(extra="forbid")

    duration_s: int = Field(default=3600, strict=True, ge=1, le=MAX_INSPECTION_S)
    """Seconds from now for which requests are kept."""
    max_requests: int = Field(default=100, strict=True, ge=1, le=MAX_REQUESTS)
    """The newest requests are kept, and no more."""
    keep_s: int = Field(default=3600, strict=True, ge=1, le=MAX_INSPECTION_S)
    """Seconds after which a kept request is deleted."""
    redact: list[RedactPattern] = Field(default=[], max_length=MAX_PATTERNS)
    """Text that is hidden too; `*` stands for any characters without a blank or a quote, at most two times."""

    @field_validator("redact")
    @classmethod
    def _has_few_stars(cls, patterns: list[str]) -> list[str]:
        if any(
            pattern.count("*") > MAX_PATTERN_STARS or len(pattern.replace("*", "")) < MIN_PATTERN
            for pattern in patterns
        ):
            raise PydanticCustomError(
                "pattern",
                "must have at most {stars} '*', and {least} other characters",
                {"stars": MAX_PATTERN_STARS, "least": MIN_PATTERN},
            )
        return patterns


class AliasTargets(BaseModel):
    """The body of `PUT /v1/aliases/{alias}`."""

    model_config = ConfigDict(extra="forbid", title="Targets")

    targets: list[Name] = Field(min_length=1, max_length=100)
    """Models, in order of preference."""
    unsupported_parameters: Literal["refuse", "adapt"] | None = None
    """Policy for parameters that the model's server does not support; null: the worker decides."""


class LaneChoice(BaseModel):
    """The body of `POST /v1/admin/jobs/{job_id}/lane`."""

    model_config = ConfigDict(extra="forbid")

    lane: LaneName
    """The lane in which the job is to wait."""


class HoldReason(BaseModel):
    """The body of `POST /v1/queues/{model}/hold`."""

    model_config = ConfigDict(extra="forbid", title="Hold")

    reason: Annotated[str, Field(max_length=200)] = ""
    """For other operators, and for callers whose requests are refused meanwhile."""


class ServiceRegistration(BaseModel):
    """The body of `PUT /v1/services/{name}`. Unknown fields are stored too."""

    model_config = ConfigDict(extra="allow", title="Record")

    name: str | None = None
    """The name in the path; optional here."""
    base_url: Annotated[str, Field(json_schema_extra={"pattern": HTTP_URL})]
    """URL of the service."""
    metadata_url: Annotated[str, Field(json_schema_extra={"pattern": f"^$|{HTTP_URL}"})] = ""
    """URL of the service's metadata; empty: `<base_url>/v1/metadata`."""

    @field_validator("base_url", "metadata_url")
    @classmethod
    def _is_http(cls, url: str, field: ValidationInfo) -> str:
        left_out = not url and field.field_name == "metadata_url"
        if not left_out and not _is_http_url(url):
            raise PydanticCustomError("url", "must be an http:// or https:// URL that has a host name")
        return url


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
