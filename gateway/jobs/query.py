"""Read the queries that find jobs. Every wrong parameter is InvalidRequest with its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from backbone.store.job_filter import JobFilter, Range
from gateway.usage.query import (
    MAX_TIME,
    Parameters,
    group_parameters,
    read_choice,
    read_names,
    read_number,
    read_one,
    read_time,
    read_values,
    require_known,
    require_order,
)
from schemas.errors import InvalidRequest
from schemas.jobs import Capability, JobStatus, Lane

EQUAL = ("status", "model", "endpoint", "capability", "service_tier", "key", "worker", "request_id")
"""Parameters that compare a field of the record. Each may be repeated: one of its values must be the field's."""
CHOICES: Mapping[str, Sequence[str]] = {
    "status": tuple(JobStatus),
    "capability": tuple(Capability),
    "service_tier": tuple(Lane),
}
TIMES = ("created_from", "created_to", "finished_from", "finished_to")
DURATIONS = ("min_duration", "max_duration")
OF_FILTER = (*EQUAL, *TIMES, *DURATIONS, "id", "error", "person", "batch")
OF_PAGE = ("after", "limit", "order", "fields")
DEFAULT_LIMIT, MAX_LIMIT = 20, 100
MAX_METADATA = 16
CLOCK_SLACK_S = 60
"""The difference between the time in a job's id and `created_at` that corrections of the clock can make."""
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_ID_PREFIX = re.compile(r"job_[0-9a-f]{0,32}")
_JOB_ID = re.compile(r"job_[0-9a-f]{32}")
_REQUEST_ID = re.compile(r"req_[0-9a-f]{24}")
_DURATION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class JobQuery:
    """A checked query for jobs."""

    conditions: JobFilter
    teams: tuple[str, ...] = ()
    """Only jobs of these teams. Empty: of all that the caller may see."""
    people: tuple[str, ...] = ()
    """Only jobs that these people submitted, or keys that they made. Empty: of anybody."""
    batch: str = ""
    """Only the jobs of this batch, which no other query finds. Empty: no batch."""
    after: str = ""
    limit: int = DEFAULT_LIMIT
    newest_first: bool = True
    fields: tuple[str, ...] = ()
    """The fields of each job that are returned. Empty: all."""


def parse_job_query(
    pairs: Sequence[tuple[str, str]],
    *,
    fields: Sequence[str],
    for_operator: bool,
    id_slack_s: float,
    others: Sequence[str] = (),
    limits: tuple[int, int] = (DEFAULT_LIMIT, MAX_LIMIT),
) -> JobQuery:
    """Return the query. Raises InvalidRequest.

    `fields`: those that the caller may see. `for_operator`: the query may name teams, and not what callers wrote: metadata.
    `id_slack_s`: how much older a job's id may be than the job. `others`: further parameters of the route. `limits`: the default
    number of jobs, and the highest.
    """
    metadata, plain = _split_metadata([] if for_operator else pairs)
    parameters = group_parameters(pairs if for_operator else plain)
    require_known(parameters, (*OF_FILTER, *OF_PAGE, *others, *(["team"] if for_operator else [])))
    default_limit, max_limit = limits
    return JobQuery(
        conditions=_conditions(parameters, metadata, id_slack_s),
        teams=read_values(parameters, "team"),
        people=read_values(parameters, "person"),
        batch=read_one(parameters, "batch") or "",
        after=_read_id(parameters, "after", _JOB_ID, "the id of a job: the 'next_after' of the page before"),
        limit=read_number(parameters, "limit", default_limit, 1, max_limit),
        newest_first=read_choice(parameters, "order", ("desc", "asc"), "desc") == "desc",
        fields=read_names(parameters, "fields", fields),
    )


def _conditions(parameters: Parameters, metadata: dict[str, str], id_slack_s: float) -> JobFilter:
    values = {}
    for name in EQUAL:
        # `?model=` filters nothing, as before filters could be repeated.
        given = tuple(value for value in read_values(parameters, name) if value)
        choices = CHOICES.get(name)
        if name == "request_id" and not all(_REQUEST_ID.fullmatch(value) for value in given):
            raise InvalidRequest("'request_id' must be an 'x-request-id' of an answer.", param=name)
        for value in given:
            if choices is not None and value not in choices:
                raise InvalidRequest(f"'{name}' must be one of {', '.join(choices)}.", param=name)
        if given:
            values[name] = given
    ranges = (*_time_range(parameters, "created"), *_time_range(parameters, "finished"), *_duration_range(parameters))
    first, last = _id_bounds(parameters, id_slack_s)
    return JobFilter(values, read_values(parameters, "error"), metadata, ranges, first, last)


def _split_metadata(pairs: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the metadata filter, and the other parameters. Raises InvalidRequest, since an ignored filter would find unwanted jobs."""
    found: dict[str, str] = {}
    others: list[tuple[str, str]] = []
    for name, value in pairs:
        if name != "metadata" and not name.startswith("metadata["):
            others.append((name, value))
            continue
        match = _METADATA.fullmatch(name)
        if match is None:
            raise InvalidRequest(
                "The filter must have the form metadata[NAME]=VALUE, with a name of 1 to 64 characters.",
                param=name[:100],
            )
        found[match[1]] = value
    if len(found) > MAX_METADATA:
        raise InvalidRequest(f"The filter may name at most {MAX_METADATA} metadata.", param="metadata")
    return found, others


def _time_range(parameters: Parameters, name: str) -> tuple[Range, ...]:
    start, end = read_time(parameters, f"{name}_from", -1), read_time(parameters, f"{name}_to", MAX_TIME)
    if start < 0 and end == MAX_TIME:
        return ()
    require_order(start, end, f"{name}_from", f"{name}_to")
    return (Range(f"{name}_at", start if start >= 0 else None, end - 1 if end < MAX_TIME else None),)


def _duration_range(parameters: Parameters) -> tuple[Range, ...]:
    least, most = (_read_seconds(parameters, name) for name in DURATIONS)
    if least is None and most is None:
        return ()
    if least is not None and most is not None and least > most:
        raise InvalidRequest("'min_duration' must not be above 'max_duration'.", param="min_duration")
    return (Range("finished_at", least, most, "started_at"),)


def _read_seconds(parameters: Parameters, name: str) -> float | None:
    value = read_one(parameters, name)
    if value is None:
        return None
    if not _DURATION.fullmatch(value):
        raise InvalidRequest(f"'{name}' must be a number of seconds.", param=name)
    return float(value)


def _id_bounds(parameters: Parameters, id_slack_s: float) -> tuple[str, str]:
    """Return the bounds of the ids that can meet the conditions: ids begin with the time at which they were made."""
    prefix = _read_id(parameters, "id", _ID_PREFIX, "the beginning of a job's id, such as job_0192")
    first, last = [prefix], [f"{prefix}g"] if prefix else []
    created_from = read_time(parameters, "created_from", -1)
    if created_from >= 0:
        first.append(_id_at(created_from - id_slack_s - CLOCK_SLACK_S))
    # A job is not older than its id, and has not ended before.
    ends = [read_time(parameters, name, 0) for name in ("created_to", "finished_to") if name in parameters]
    last += [_id_at(end + CLOCK_SLACK_S) for end in ends]
    return max(first), min(last, default="")


def _id_at(seconds: float) -> str:
    """Return the smallest id of the time."""
    return f"job_{min(max(0, int(seconds * 1000)), 2**48 - 1):012x}"


def _read_id(parameters: Parameters, name: str, form: re.Pattern[str], what: str) -> str:
    value = read_one(parameters, name) or ""
    if value and not form.fullmatch(value):
        raise InvalidRequest(f"'{name}' must be {what}.", param=name)
    return value
