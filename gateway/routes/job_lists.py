"""What the lists and exports of jobs share: those of a team's own jobs, and those of operators."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from gateway.dependencies import Parts
from gateway.job_requests import MAX_ITEMS, BulkRequest, TeamBulkRequest
from gateway.jobs.bulk import BulkOutcome, change_all
from gateway.jobs.export import CSV, JSON_LINES, MAX_EXPORTED, ToObject, csv_table, json_lines, pick
from gateway.jobs.query import DEFAULT_LIMIT, MAX_LIMIT, JobQuery, parse_job_query
from gateway.jobs.records import job_object, job_state_object
from gateway.jobs.search import LineJobs
from gateway.usage.query import group_parameters, read_choice
from schemas.errors import InvalidRequest
from schemas.job_fields import JOB_FIELDS, JOB_STATE_FIELDS
from schemas.jobs import JobStatus


class JobLists:
    """Answers one caller: about the team's own jobs, or as an operator about all jobs, without what callers wrote."""

    def __init__(self, parts: Parts, caller: str, *, for_operator: bool) -> None:
        """`caller`: the team of the caller."""
        self._parts = parts
        self._caller = caller
        self._for_operator = for_operator
        self._fields: Sequence[str] = JOB_STATE_FIELDS if for_operator else JOB_FIELDS
        self._to_object: ToObject = job_state_object if for_operator else job_object

    async def page(self, request: Request) -> dict[str, Any]:
        """Return a page as OpenAI's list object."""
        query = self._query(request, (DEFAULT_LIMIT, MAX_LIMIT))
        owners = self._owners(query)
        records, after = await self._parts.job_search.page(self._caller, owners, query, await self._lines(query))
        return {
            "object": "list",
            "data": [pick(self._to_object(record), query.fields) for record in records],
            "first_id": records[0].job if records else None,
            "last_id": records[-1].job if records else None,
            "has_more": bool(after),
            "next_after": after or None,
        }

    async def export(self, request: Request) -> StreamingResponse:
        """Return all jobs that are asked for, while they are read."""
        query = self._query(request, (MAX_EXPORTED, MAX_EXPORTED), "format")
        form = read_choice(group_parameters(request.query_params.multi_items()), "format", ("jsonl", "csv"), "jsonl")
        pages = self._parts.job_search.pages(self._caller, self._owners(query), query, await self._lines(query))
        if form == "csv":
            pieces, media_type = csv_table(pages, self._to_object, query.fields or self._fields), CSV
        else:
            pieces, media_type = json_lines(pages, self._to_object, query.fields), JSON_LINES
        first = await anext(pieces, b"")  # a failure here can still be sent as an error
        headers = {"content-disposition": f'attachment; filename="jobs.{form}"'}
        return StreamingResponse(_resume(first, pieces), media_type=media_type, headers=headers)

    async def change(
        self, body: BulkRequest, act: Callable[[str, str], Awaitable[object]], only: Sequence[JobStatus]
    ) -> tuple[BulkOutcome, str | None]:
        """Call `act` with the owner and the id of each job that the body names, and return the `after` of the next call.

        `only`: the statuses that a filter finds, unless it names some.
        """
        parameters = body.parameters()
        if body.ids is not None:
            team = body.team if isinstance(body, TeamBulkRequest) else self._caller
            return await change_all(list(dict.fromkeys(body.ids)), str, lambda job: act(team, job)), None
        if not any(name == "status" for name, _ in parameters):
            parameters += [("status", status) for status in only]
        query = self.parse(parameters, (MAX_ITEMS, MAX_ITEMS))
        records, after = await self._parts.job_search.page(
            self._caller, self._owners(query), query, await self._lines(query)
        )
        result = await change_all(records, lambda record: record.job, lambda record: act(record.owner, record.job))
        return result, after or None

    def parse(self, pairs: Sequence[tuple[str, str]], limits: tuple[int, int], *others: str) -> JobQuery:
        """Return a checked query. Raises InvalidRequest."""
        return parse_job_query(
            pairs,
            fields=self._fields,
            for_operator=self._for_operator,
            id_slack_s=self._parts.job_search.id_slack_s,
            others=others,
            limits=limits,
        )

    def _query(self, request: Request, limits: tuple[int, int], *others: str) -> JobQuery:
        return self.parse(request.query_params.multi_items(), limits, *others)

    def _owners(self, query: JobQuery) -> list[str] | None:
        """Return the teams whose jobs are searched; None: all."""
        return (list(query.teams) or None) if self._for_operator else [self._caller]

    async def _lines(self, query: JobQuery) -> LineJobs | None:
        """Return the jobs of the query's batch; None: it names no batch. Raises InvalidRequest, BatchNotFound."""
        if not query.batch:
            return None
        owners = self._owners(query)
        if owners is None or len(owners) != 1:
            raise InvalidRequest("Name the batch's team with 'team'.", param="team")
        return await self._parts.batches.line_jobs(owners[0], query.batch)


UNFINISHED = (JobStatus.QUEUED, JobStatus.IN_PROGRESS)
RETRYABLE = (JobStatus.FAILED,)


async def _resume(first: bytes, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        yield first
        async for piece in pieces:
            yield piece
