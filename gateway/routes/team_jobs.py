"""`/v1/admin/jobs`: the state of any team's jobs, for operators, without what is in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from gateway.audit.entry import AuditEntry
from gateway.audit.route import AuditedRoute
from gateway.auth.authenticator import Principal
from gateway.dependencies import AdminReader, AuditDep, Operator, Parts, PartsDep
from gateway.http.request_body import read_json
from gateway.job_requests import TeamBulkRequest
from gateway.jobs.records import job_state_object
from gateway.routes.job_lists import RETRYABLE, UNFINISHED, JobLists
from schemas.jobs import JobStatus

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

Team = Annotated[str, Query(min_length=1, max_length=200)]


@router.get("/v1/admin/jobs")
async def list_team_jobs(request: Request, parts: PartsDep, caller: AdminReader, audit: AuditDep) -> dict[str, Any]:
    """List the jobs of all teams that meet the filters, newest first."""
    audit.target_team = _one_team(request)
    return await JobLists(parts, caller.owner, for_operator=True).page(request)


@router.get("/v1/admin/jobs/export")
async def export_team_jobs(request: Request, parts: PartsDep, caller: AdminReader, audit: AuditDep) -> Response:
    """Return the state of the jobs of all teams that meet the filters as JSON lines or CSV."""
    audit.target_team = _one_team(request)
    return await JobLists(parts, caller.owner, for_operator=True).export(request)


@router.post("/v1/admin/jobs/bulk/cancel")
async def cancel_team_jobs(request: Request, parts: PartsDep, caller: Operator, audit: AuditDep) -> dict[str, Any]:
    """Cancel the jobs of all teams that meet a filter."""
    return await _change(request, parts, caller, audit, parts.jobs.cancel, UNFINISHED)


@router.post("/v1/admin/jobs/bulk/retry")
async def retry_team_jobs(request: Request, parts: PartsDep, caller: Operator, audit: AuditDep) -> dict[str, Any]:
    """Start new runs of the failed jobs of all teams that meet a filter."""
    return await _change(request, parts, caller, audit, parts.jobs.retry, RETRYABLE)


async def _change(
    request: Request,
    parts: Parts,
    caller: Principal,
    audit: AuditEntry,
    act: Callable[[str, str], Awaitable[object]],
    only: Sequence[JobStatus],
) -> dict[str, Any]:
    body = await read_json(request, TeamBulkRequest)
    audit.details["filter"] = body.filter
    result, after = await JobLists(parts, caller.owner, for_operator=True).change(body, act, only)
    audit.details |= result.details()
    return result.to_object(after)


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


def _one_team(request: Request) -> str:
    """Return the team that a query names. Empty: it names none, or several."""
    teams = request.query_params.getlist("team")
    return teams[0] if len(teams) == 1 else ""
