"""Keep the content keys of durable jobs, and forget them: without its key, what is stored of a job's content is noise.

The keys lie in a bucket of their own that workers have no rights to. Forgetting a key overwrites it on the disk, so that content
is gone at once wherever copies of it are: in the queue's file, in events, in the outcome, in a dead letter.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from backbone.bus.content_seals import ContentKey
from backbone.bus.job_log import ContentKeyLog
from backbone.team_keys import TeamKeys


class JobContent(NamedTuple):
    """What is needed to read a job's content, and how long it is kept."""

    key: ContentKey
    retain_none: bool
    """The content is forgotten once it was delivered."""


class _StoredKey(BaseModel):
    model_config = ConfigDict(frozen=True)

    key: str
    retain_none: bool = False


class ContentKeys:
    """Makes, finds and forgets the content keys of jobs."""

    def __init__(self, log: ContentKeyLog, team_keys: TeamKeys) -> None:
        """Wrap keys of jobs with the key of their team, where it has one."""
        self._log = log
        self._team_keys = team_keys

    def are_needed(self, owner: str, *, retain_none: bool) -> bool:
        """Return whether the jobs of an owner are sealed."""
        return retain_none or self._team_keys.has(owner)

    async def create(self, job: str, owner: str, *, retain_none: bool) -> ContentKey:
        """Return the key of a job, a new one if it has none. Raises Unavailable."""
        new = _StoredKey(key=str(ContentKey.new()), retain_none=retain_none)
        value = self._team_keys.seal(owner, _name(job), new.model_dump_json().encode())
        return self._read(job, await self._log.claim_content_key(job, value)).key

    async def find(self, job: str) -> JobContent | None:
        """Return a job's key; None: it was forgotten, or the job never had one. Raises Unavailable, TeamKeyMissing."""
        stored = await self._log.read_content_key(job)
        return None if stored is None else self._read(job, stored)

    async def forget(self, job: str) -> None:
        """Make a job's content unreadable for good. Idempotent. Raises Unavailable."""
        await self._log.erase_content_key(job)

    def _read(self, job: str, stored: bytes) -> JobContent:
        value = _StoredKey.model_validate_json(self._team_keys.open(_name(job), stored))
        return JobContent(ContentKey.parse(value.key), value.retain_none)


def _name(job: str) -> str:
    return f"content key {job}"
