"""The response bodies of the routes of the inspector."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.inspection import InspectedRequest, InspectedSummary


class InspectionState(BaseModel):
    """Whether a team's requests are kept for administrators."""

    model_config = ConfigDict(title="Inspection")

    object: Literal["inspection"]
    team: str
    active: bool
    until: int | None
    """Unix seconds; null: they are not kept."""
    max_requests: int | None
    keep_s: int | None


class InspectionList(BaseModel):
    """The teams that are inspected."""

    object: Literal["list"]
    data: list[InspectionState]


class InspectedRequestSummary(InspectedSummary):
    """A kept request in a list."""

    object: Literal["inspected_request"]


class InspectedRequestList(BaseModel):
    """Kept requests, newest first."""

    object: Literal["list"]
    data: list[InspectedRequestSummary]


class InspectedRequestObject(InspectedRequest):
    """A kept request with its answer, after redaction."""

    model_config = ConfigDict(title="InspectedRequestWithAnswer")

    object: Literal["inspected_request"]
