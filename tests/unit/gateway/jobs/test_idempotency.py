"""One Idempotency-Key, one job: also where many ask at once, and where the first of them died."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backbone.testing.store import list_jobs
from gateway.jobs.api import Submission
from gateway.jobs.idempotency import Idempotency, IdempotencyMismatch
from schemas.endpoints import BY_PATH
from schemas.errors import QueueFull, Unavailable
from schemas.jobs import JobRecord, JobStatus, Upload
from tests.unit.gateway.jobs.rig import OWNER, Gateway, Rig


async def submit(rig: Rig, gateway: Gateway, key: str, text: str = "hello you", **fields: Any) -> JobRecord:
    """As a gateway does it: claim, then submit under the id that was claimed."""
    submission: Submission = rig.submission(text, **fields)
    idempotency = Idempotency(gateway.log, rig.blobs)
    submission.job_id = await idempotency.job_id(
        submission.principal.owner, key, submission.endpoint.path, submission.received
    )
    return await gateway.jobs.submit(submission)


async def test_fifty_at_once_are_one_job(rig: Rig) -> None:
    """Over several gateways. It runs once, and all get its answer."""
    gateways = [rig.gateways[0], await rig.gateway(), await rig.gateway()]
    await rig.worker()
    records = await asyncio.gather(*(submit(rig, gateways[at % 3], "k") for at in range(50)))
    assert len({record.job for record in records}) == 1
    job = records[0].job
    assert (await rig.ended(job)).status is JobStatus.COMPLETED
    await rig.eventually(lambda: not rig.queued)
    assert rig.ran == [job]
    assert rig.broker.last_seq == 1
    again = await submit(rig, gateways[1], "k")
    assert (again.job, again.status) == (job, JobStatus.COMPLETED)
    assert rig.kinds(job).count("q") >= 1


async def test_keys_and_owners_have_jobs_of_their_own(rig: Rig) -> None:
    gateway = rig.gateways[0]
    idempotency = Idempotency(gateway.log, rig.blobs)
    received = rig.submission().received
    ids = {
        await idempotency.job_id(owner, key, "/v1/chat/completions", received)
        for owner, key in ((OWNER, "a"), (OWNER, "b"), ("bob", "a"), (OWNER, "a"))
    }
    assert len(ids) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "other"},
        {"stream": True},
        {"temperature": 0.5},
        {"endpoint": BY_PATH["/v1/completions"], "prompt": "x"},
    ],
)
async def test_another_request_under_the_same_key_is_refused(rig: Rig, fields: dict[str, Any]) -> None:
    """422; what was submitted stays as it is."""
    gateway = rig.gateways[0]
    record = await submit(rig, gateway, "k")
    with pytest.raises(IdempotencyMismatch) as caught:
        await submit(rig, gateway, "k", **fields)
    assert (caught.value.info.status, caught.value.info.code) == (422, "idempotency_mismatch")
    assert rig.queued == 1
    assert (await submit(rig, gateway, "k")).job == record.job


async def test_the_same_request_written_otherwise_is_the_same(rig: Rig) -> None:
    """Fields in any order."""
    gateway = rig.gateways[0]
    first = await submit(rig, gateway, "k", temperature=0.5, max_tokens=3)
    assert (await submit(rig, gateway, "k", max_tokens=3, temperature=0.5)).job == first.job


async def test_files_are_compared_by_their_bytes(rig: Rig) -> None:
    """Whether they travel in the message or as a blob."""
    idempotency = Idempotency(rig.gateways[0].log, rig.blobs)

    async def job_id(data: bytes, *, by_blob: bool) -> str:
        received = rig.submission().received
        name = None
        if by_blob:
            writer = rig.blobs.writer(ttl_s=60)
            await writer.write(data)
            name = (await writer.close()).name
        received.body_size = len(received.body)
        received.body += b"" if by_blob else data
        received.uploads = (Upload(field="file", filename="f", size=len(data), blob=name),)
        return await idempotency.job_id(OWNER, "k", "/v1/audio/transcriptions", received)

    first = await job_id(b"sound", by_blob=False)
    assert await job_id(b"sound", by_blob=True) == first
    for by_blob in (False, True):
        with pytest.raises(IdempotencyMismatch):
            await job_id(b"nois3", by_blob=by_blob)


class TestTheFirstDies:
    async def test_between_claim_and_record(self, rig: Rig) -> None:
        """The second request submits the job that the first one claimed."""
        gateway = rig.gateways[0]
        first = rig.submission()
        job = await Idempotency(gateway.log, rig.blobs).job_id(OWNER, "k", first.endpoint.path, first.received)
        await rig.worker()
        assert (await submit(rig, gateway, "k")).job == job
        assert (await rig.ended(job)).status is JobStatus.COMPLETED
        assert rig.ran == [job]

    async def test_after_the_queue_without_a_confirmation(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message that was queued all the same still has its blobs when it runs."""
        gateway = rig.gateways[0]
        store = gateway.log.enqueue

        async def unheard(*args: Any) -> int:
            await store(*args)
            raise Unavailable("NATS does not answer")

        first = rig.submission(job_id="job_" + "a" * 32)
        writer = rig.blobs.writer(ttl_s=60)
        await writer.write(first.received.body)
        first.received.body_blob, first.received.body = (await writer.close()).name, b""
        first.received.blobs = [writer]
        monkeypatch.setattr(gateway.log, "enqueue", unheard)
        with pytest.raises(Unavailable):
            await rig.jobs.submit(first)
        await first.received.discard()  # as its caller does then
        monkeypatch.undo()
        await rig.jobs.submit(rig.submission(job_id=first.job_id))
        await rig.worker()
        assert (await rig.ended(first.job_id)).status is JobStatus.COMPLETED

    async def test_between_record_and_queue(self, rig: Rig) -> None:
        """The record alone is no job."""
        gateway = rig.gateways[0]

        async def die(*_: Any) -> int:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(gateway.log, "enqueue", die)
            patch.setattr(rig.store, "remove", die)
            patch.setattr("gateway.jobs.submitter.JobSubmitter._revoke", die)
            await submit(rig, gateway, "k")
        assert rig.queued == 0
        record = await submit(rig, gateway, "k")
        await rig.worker()
        assert (await rig.ended(record.job)).status is JobStatus.COMPLETED

    async def test_between_queue_and_answer(self, rig: Rig) -> None:
        """It is in the queue already, and stays there once."""
        gateway = rig.gateways[0]
        first = await submit(rig, gateway, "k")
        rig.broker.job_log.events.clear()  # its first event was not stored any more
        assert (await submit(rig, gateway, "k")).job == first.job
        await rig.worker()
        assert (await rig.ended(first.job)).status is JobStatus.COMPLETED
        await rig.eventually(lambda: not rig.queued)
        assert rig.ran == [first.job]


async def test_one_that_was_refused_may_come_again(rig: Rig) -> None:
    """Nothing of the first attempt is left; it is the same job then."""
    gateway = rig.gateways[0]
    rig.broker.max_per_queue = 0
    with pytest.raises(QueueFull):
        await submit(rig, gateway, "k")
    assert await list_jobs(rig.store, OWNER) == []
    rig.broker.max_per_queue = 10
    record = await submit(rig, gateway, "k")
    await rig.worker()
    assert (await rig.ended(record.job)).status is JobStatus.COMPLETED


async def test_without_a_key_what_was_refused_never_runs(rig: Rig) -> None:
    """Also where NATS had stored it, and only its confirmation was lost."""
    gateway = rig.gateways[0]
    store = gateway.log.enqueue

    async def unconfirmed(*args: Any) -> int:
        await store(*args)
        raise Unavailable

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Unavailable):
        patch.setattr(gateway.log, "enqueue", unconfirmed)
        await rig.submit()
    assert rig.queued == 1
    await rig.worker()
    await rig.eventually(lambda: not rig.queued)
    assert rig.ran == []
