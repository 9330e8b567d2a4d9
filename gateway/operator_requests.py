"""Bodies of operators' requests: API keys, aliases and services."""

from __future__ import annotations

import math
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.http.request_body import Name
from schemas.errors import InvalidRequest
from schemas.keys import Scope

MAX_LIFETIME_S = 10 * 365 * 86_400
MAX_EXPIRES_AT = 2**40
MAX_JOBS = 1_000_000
HTTP_URL = r"^https?://[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?(:[1-9][0-9]{1,3})?(/[!-~]*)?$"
"""Usual form of a URL, for the OpenAPI document alone: other forms are accepted too, such as an address in brackets."""

JobCount = Annotated[int, Field(strict=True, le=MAX_JOBS)]


class NewKey(BaseModel):
    """The body of `POST /v1/keys`."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    owner: Name | None = None
    """Owner of the key's jobs, files, batches and responses; keys of one owner share them. Default: a new owner with the
    key's name."""
    scopes: list[Scope] = Field(default=[Scope.INFERENCE, Scope.JOBS], min_length=1)
    max_queued: Annotated[JobCount, Field(ge=0)] | None = None
    """Jobs that may wait at once; null: no limit of its own."""
    max_running: Annotated[JobCount, Field(ge=1)] | None = None
    """Jobs that may run at once; null: no limit of its own."""
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


class AliasTargets(BaseModel):
    """The body of `PUT /v1/aliases/{alias}`."""

    model_config = ConfigDict(extra="forbid", title="Targets")

    targets: list[Name] = Field(min_length=1, max_length=100)
    """Models, in order of preference."""
    unsupported_parameters: Literal["refuse", "adapt"] | None = None
    """Policy for parameters that the model's server does not support; null: the worker decides."""


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
