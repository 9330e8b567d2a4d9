"""Groups of dead letters with one error and one model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from backbone.bus.job_log import StoredDeadLetter
from gateway.job_requests import GroupRequest
from gateway.jobs.api import JobsApi

MAX_READ = 5000
"""Dead letters that one call reads, the newest first."""
PAGE_SIZE = 100
MAX_GROUPS = 200


@dataclass(slots=True)
class _Group:
    newest: StoredDeadLetter
    oldest: StoredDeadLetter
    count: int = 0
    teams: set[str] = field(default_factory=set)


def error_of(letter: StoredDeadLetter) -> str:
    """Return the code of a dead letter's error, or its type where it has no code."""
    error = letter.outcome.error
    return (error.code or error.type) if error is not None else "unknown"


async def read_letters(jobs: JobsApi, before: int | None, most: int = MAX_READ) -> AsyncIterator[StoredDeadLetter]:
    """Yield at most `most` dead letters with sequence numbers below `before`, newest first. Raises Unavailable."""
    left = most
    while left > 0:
        page = await jobs.dead_letters(before=before, limit=min(PAGE_SIZE, left))
        for letter in page:
            yield letter
        if len(page) < min(PAGE_SIZE, left):
            return
        before, left = page[-1].seq, left - len(page)


async def group_letters(jobs: JobsApi) -> dict[str, Any]:
    """Return the groups of the newest dead letters, the largest first. Raises Unavailable."""
    groups: dict[tuple[str, str], _Group] = {}
    read = 0
    async for letter in read_letters(jobs, None):
        read += 1
        key = (error_of(letter), letter.outcome.public_model)
        group = groups.setdefault(key, _Group(letter, letter))
        group.oldest = letter
        group.count += 1
        group.teams.add(letter.outcome.owner)
    ordered = sorted(groups.items(), key=lambda item: -item[1].count)
    return {
        "object": "list",
        "data": [_group_object(error, model, group) for (error, model), group in ordered[:MAX_GROUPS]],
        "read": read,
        "complete": read < MAX_READ and len(ordered) <= MAX_GROUPS,
    }


async def find_letters(jobs: JobsApi, wanted: GroupRequest) -> tuple[list[StoredDeadLetter], int | None]:
    """Return the dead letters of a group, and the `before` of the next call; None: there are no more. Raises Unavailable."""
    found: list[StoredDeadLetter] = []
    read, last = 0, None
    async for letter in read_letters(jobs, wanted.before):
        if len(found) == wanted.limit:
            return found, last
        read, last = read + 1, letter.seq
        if error_of(letter) == wanted.error and letter.outcome.public_model == wanted.model:
            found.append(letter)
    return found, last if read == MAX_READ else None


def _group_object(error: str, model: str, group: _Group) -> dict[str, Any]:
    newest = group.newest
    return {
        "object": "dead_letter_group",
        "error": error,
        "model": model,
        "count": group.count,
        "teams": len(group.teams),
        "oldest_at": group.oldest.stored_at,
        "newest_at": newest.stored_at,
        "newest_id": newest.outcome.job,
        "message": newest.outcome.error.message if newest.outcome.error is not None else None,
    }
