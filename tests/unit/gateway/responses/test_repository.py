"""The repository of responses, with documents and blobs in memory."""

from __future__ import annotations

from typing import Any

import pytest

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobNotFound
from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.byte_quotas import MemoryByteQuotas
from backbone.testing.documents import MemoryDocumentStore
from gateway.http.disconnect import CallerTasks
from gateway.http.request_body import validate_body
from gateway.jobs.api import JobNotFound
from gateway.responses.repository import ResponseNotFound, ResponseRepository, StoredResponse
from gateway.responses.resource import initial_response
from gateway.responses.service import ResponseService
from schemas.errors import Unavailable
from schemas.openai.responses import ResponsesRequest

pytestmark = pytest.mark.asyncio

JOB = "job_" + "a" * 32
ID = "resp_" + "a" * 32
BIG = "x" * INLINE_LIMIT_BYTES


class Bench:
    """A shelf, and what it stands on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.documents = MemoryDocumentStore(lambda: self.now)
        self.blobs = MemoryBlobStore()
        self.quotas = MemoryByteQuotas(lambda: self.now)
        self.repository = ResponseRepository(self.documents, self.blobs, 100.0, self.quotas)

    async def add(
        self,
        text: str = "hi",
        *,
        talk: str = "hi",
        owner: str = "me",
        job: str = JOB,
        most: int | None = None,
        **fields: Any,
    ) -> StoredResponse:
        asked = validate_body({"model": "m", "input": "hi", "instructions": text} | fields, ResponsesRequest)
        said = {"messages": [talk], "input": []}
        return await self.repository.add(owner, job, initial_response(asked, job, 1), said, most)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def final_of(stored: StoredResponse, status: str = "completed", **fields: Any) -> dict[str, Any]:
    return stored.initial | {"status": status} | fields


@pytest.mark.parametrize("text", ["small", BIG])
async def test_stored_and_found(bench: Bench, text: str) -> None:
    """Small or large, it comes back as it was, for its owner alone, and for its time."""
    stored = await bench.add(text, talk=text)
    found = await bench.repository.get("me", ID)
    assert found == stored
    assert found.initial["instructions"] == text
    assert await bench.repository.talk(found) == {"messages": [text], "input": []}
    for owner, which in (("you", ID), ("me", "resp_" + "b" * 32), ("me", "nonsense"), ("me", "")):
        with pytest.raises(ResponseNotFound):
            await bench.repository.get(owner, which)
    bench.now = 101.0
    with pytest.raises(ResponseNotFound):
        await bench.repository.get("me", ID)


@pytest.mark.parametrize("text", ["small", BIG])
async def test_the_first_end_is_the_end(bench: Bench, text: str) -> None:
    """Of two concurrent final responses one is stored, and nothing of the other remains."""
    stored = await bench.add(text)
    first, second = final_of(stored, completed_at=1, output=[text]), final_of(stored, completed_at=2, output=[text])
    assert await bench.repository.finish(stored, first) == first
    assert await bench.repository.finish(stored, second) == first
    assert (await bench.repository.get("me", ID)).final == first
    assert len(bench.blobs.chunks_by_name()) == (1 if text is BIG else 0)


async def test_a_failed_one_may_be_tried_again(bench: Bench) -> None:
    """A failed response is stored until the job's next run ends differently."""
    stored = await bench.add()
    await bench.repository.finish(stored, final_of(stored, "failed"))
    done = final_of(stored)
    assert await bench.repository.finish(stored, done) == done
    assert (await bench.repository.get("me", ID)).final == done


async def test_deleted_meanwhile(bench: Bench) -> None:
    """What was deleted while it ended stays deleted, blobs included."""
    stored = await bench.add(BIG, talk=BIG)
    assert await bench.repository.remove(stored)
    assert not await bench.repository.remove(stored)
    await bench.repository.finish(stored, final_of(stored, output=[BIG]))
    with pytest.raises(ResponseNotFound):
        await bench.repository.get("me", ID)
    assert bench.blobs.chunks_by_name() == {}


async def test_added_twice(bench: Bench) -> None:
    """Who comes second with the same id finds what is there; nothing of the second one stays."""
    stored = await bench.add(BIG)
    assert (await bench.add("other")).initial == stored.initial
    assert len(bench.blobs.chunks_by_name()) == 1


async def test_it_ends_while_it_is_read(bench: Bench) -> None:
    """A reader of the old document finds the new one."""
    stored = await bench.add(BIG)
    look_up = bench.blobs.read

    def once(name: str) -> Any:
        bench.blobs.read = look_up  # type: ignore[method-assign]
        return gone()

    async def gone() -> Any:
        await bench.repository.finish(stored, final_of(stored))
        raise BlobNotFound
        yield b""

    bench.blobs.read = once  # type: ignore[method-assign]
    found = await bench.repository.get("me", ID)
    assert found.final is not None


async def test_no_half_documents(bench: Bench) -> None:
    """If the store or the blobs are unavailable, nothing is stored and nothing is left over."""
    bench.documents.available = False
    with pytest.raises(Unavailable):
        await bench.add(BIG)
    bench.documents.available = True
    assert bench.blobs.chunks_by_name() == {}
    with pytest.raises(ResponseNotFound):
        await bench.repository.get("me", ID)
    bench.blobs.available = False
    with pytest.raises(Unavailable):
        await bench.add(BIG)
    with pytest.raises(ResponseNotFound):
        await bench.repository.get("me", ID)


async def test_it_outlives_its_job(bench: Bench) -> None:
    """A response that was read after completion outlives its job; an unread one is deleted with it."""

    class NoJobs:
        async def get(self, owner: str, job_id: str) -> Any:
            raise JobNotFound

    responses = ResponseService(
        NoJobs(), CallerTasks(), bench.repository, bench.blobs, None, None, None, None, keep_alive_s=1.0,  # type: ignore[arg-type]
    )  # fmt: skip
    stored = await bench.add()
    with pytest.raises(ResponseNotFound):
        await responses.retrieve("me", ID)
    for status in ("failed", "completed"):
        done = final_of(stored, status)
        await bench.repository.finish(stored, done)
        assert await responses.retrieve("me", ID) == done


async def test_an_owners_oldest_responses_make_room(bench: Bench) -> None:
    """Large or small, the conversation and the final response count. Those that changed last stay, and those of others; a deleted one
    makes room.
    """
    theirs = await bench.add(BIG, talk=BIG, owner="you", job="job_" + "f" * 32)
    added = []
    for number in range(3):
        bench.now += 1
        added.append(await bench.add("small", talk=BIG, job=f"job_{number:032x}", most=3 * len(BIG)))
    bench.now += 1
    await bench.repository.finish(added[1], final_of(added[1], text=BIG))
    await bench.add(job="job_" + "d" * 32, most=3 * len(BIG))
    for stored, is_there in zip(added, (False, True, False), strict=True):
        found = await bench.documents.get("response", "me", stored.id)
        assert (found is not None) is is_there
    assert len(bench.blobs.chunks_by_name()) == 2 + 2
    assert await bench.repository.remove(await bench.repository.get("me", added[1].id))
    assert bench.quotas.used("me") < 2 * len(BIG)
    assert await bench.repository.get("you", theirs.id) == theirs
