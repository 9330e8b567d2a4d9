"""`/v1/admin/jobs`: the state of any team's jobs, for operators, without what is in them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, AuditDep, Operator, PartsDep
from gateway.jobs.records import job_state_object
from schemas.jobs import JobStatus

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

Team = Annotated[str, Query(min_length=1, max_length=200)]


@router.get("/v1/admin/jobs")
async def list_team_jobs(
    team: Team,
    parts: PartsDep,
    _: AdminReader,
    audit: AuditDep,
    status: Annotated[JobStatus | None, Query()] = None,
    model: Annotated[str, Query()] = "",
    after: Annotated[str, Query()] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """List a team's jobs, newest first, filtered by status and model."""
    audit.target_team = team
    records, has_more = await parts.jobs.page(team, status=status, model=model, metadata={}, after=after, limit=limit)
    return {"object": "list", "data": [job_state_object(record) for record in records], "has_more": has_more}


@router.get("/v1/admin/jobs/{job_id}")
async def get_team_job(job_id: str, team: Team, parts: PartsDep, _: AdminReader, audit: AuditDep) -> dict[str, Any]:
    """Return the state of one job."""
    audit.target_team = team
    return job_state_object(await parts.jobs.get(team, job_id))


@router.post("/v1/admin/jobs/{job_id}/cancel")
async def cancel_team_job(job_id: str, team: Team, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Cancel a job: a queued job never runs, a running job is stopped, an ended job stays unchanged."""
    audit.target_team = team
    return job_state_object(await parts.jobs.cancel(team, job_id))
