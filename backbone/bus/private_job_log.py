"""A sealed job log that decrypts the content of jobs for those who read it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from backbone.bus.content_keys import ContentKeys, JobContent
from backbone.bus.content_seals import ContentUnreadable, open_frame, open_result
from backbone.bus.job_log import JobLog, StoredEvent, StoredOutcome
from backbone.bus.sealed_job_log import OnRefused, SealedJobLog
from backbone.team_keys import TeamKeys
from schemas.frames import FrameKind
from schemas.jobs import JobStatus

SEALED = FrameKind.SEALED.value.encode() + b" "


class PrivateJobLog(SealedJobLog):
    """A job log whose events and results are readable. Its work queues and everything else are those of `SealedJobLog`."""

    def __init__(self, inner: JobLog, on_refused: OnRefused, team_keys: TeamKeys) -> None:
        super().__init__(inner, on_refused)
        self.content_keys = ContentKeys(inner, team_keys)

    async def follow_events(self, job: str, after: int = 0) -> AsyncGenerator[StoredEvent | None, None]:
        """Yield the events as `JobLog` does, decrypted; sealed as they are where their key was forgotten. Raises ContentUnreadable."""
        content: JobContent | None = None
        async with aclosing(super().follow_events(job, after)) as events:
            async for event in events:
                if event is None or not event.data.startswith(SEALED):
                    yield event
                    continue
                content = content or await self.content_keys.find(job)
                yield event if content is None else event._replace(data=open_frame(content.key, job, event.data))

    async def read_outcome(self, job: str) -> StoredOutcome | None:
        """Return the outcome, its result decrypted. `is_forgotten` says that this was not possible."""
        stored = await super().read_outcome(job)
        if stored is None or not stored.outcome.sealed:
            return stored
        content = await self.content_keys.find(job)
        if content is None:
            return stored._replace(payload=b"", is_forgotten=True)
        if stored.outcome.status is not JobStatus.COMPLETED:  # the payload is the job's message, which stays sealed
            return stored
        try:
            outcome, payload = open_result(content.key, stored.outcome, stored.payload)
        except ContentUnreadable:  # the worker that ran the job has damaged it
            return stored._replace(payload=b"", is_forgotten=True)
        return stored._replace(outcome=outcome, payload=payload)
