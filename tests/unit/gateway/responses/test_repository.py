"""What is kept of responses, on documents and blobs in memory."""

from __future__ import annotations

from typing import Any

import pytest

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobNotFound
from backbone.testing.blobs import MemoryBlobStore
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
        self.shelf = ResponseRepository(self.documents, self.blobs, 100.0)

    async def add(self, text: str = "hi", *, talk: str = "hi", **fields: Any) -> StoredResponse:
        asked = validate_body({"model": "m", "input": "hi", "instructions": text} | fields, ResponsesRequest)
        return await self.shelf.add("me", JOB, initial_response(asked, JOB, 1), {"messages": [talk], "input": []})


@pytest.fixture
def bench() -> Bench:
    return Bench()


def final_of(kept: StoredResponse, status: str = "completed", **fields: Any) -> dict[str, Any]:
    return kept.shell | {"status": status} | fields


@pytest.mark.parametrize("text", ["small", BIG])
async def test_kept_and_found(bench: Bench, text: str) -> None:
    """Small or large, it comes back as it was, for its owner alone, and for its time."""
    kept = await bench.add(text, talk=text)
    found = await bench.shelf.get("me", ID)
    assert found == kept
    assert found.shell["instructions"] == text
    assert await bench.shelf.talk(found) == {"messages": [text], "input": []}
    for owner, which in (("you", ID), ("me", "resp_" + "b" * 32), ("me", "nonsense"), ("me", "")):
        with pytest.raises(ResponseNotFound):
            await bench.shelf.get(owner, which)
    bench.now = 101.0
    with pytest.raises(ResponseNotFound):
        await bench.shelf.get("me", ID)


@pytest.mark.parametrize("text", ["small", BIG])
async def test_the_first_end_is_the_end(bench: Bench, text: str) -> None:
    """Two who see the end keep one of them; nothing of the other stays."""
    kept = await bench.add(text)
    first, second = final_of(kept, completed_at=1, output=[text]), final_of(kept, completed_at=2, output=[text])
    assert await bench.shelf.finish(kept, first) == first
    assert await bench.shelf.finish(kept, second) == first
    assert (await bench.shelf.get("me", ID)).final == first
    assert len(bench.blobs.stored()) == (1 if text is BIG else 0)


async def test_a_failed_one_may_be_tried_again(bench: Bench) -> None:
    """A failure is kept until the job's next run has another end."""
    kept = await bench.add()
    await bench.shelf.finish(kept, final_of(kept, "failed"))
    done = final_of(kept)
    assert await bench.shelf.finish(kept, done) == done
    assert (await bench.shelf.get("me", ID)).final == done


async def test_deleted_meanwhile(bench: Bench) -> None:
    """What was deleted while it ended stays deleted, blobs included."""
    kept = await bench.add(BIG, talk=BIG)
    assert await bench.shelf.remove(kept)
    assert not await bench.shelf.remove(kept)
    await bench.shelf.finish(kept, final_of(kept, output=[BIG]))
    with pytest.raises(ResponseNotFound):
        await bench.shelf.get("me", ID)
    assert bench.blobs.stored() == {}


async def test_added_twice(bench: Bench) -> None:
    """Who comes second with the same id finds what is there; nothing of the second one stays."""
    kept = await bench.add(BIG)
    assert (await bench.add("other")).shell == kept.shell
    assert len(bench.blobs.stored()) == 1


async def test_it_ends_while_it_is_read(bench: Bench) -> None:
    """A reader who holds the old document finds the new one."""
    kept = await bench.add(BIG)
    look_up = bench.blobs.read

    def once(name: str) -> Any:
        bench.blobs.read = look_up  # type: ignore[method-assign]
        return gone()

    async def gone() -> Any:
        await bench.shelf.finish(kept, final_of(kept))
        raise BlobNotFound
        yield b""

    bench.blobs.read = once  # type: ignore[method-assign]
    found = await bench.shelf.get("me", ID)
    assert found.final is not None


async def test_no_half_documents(bench: Bench) -> None:
    """Where the store or the blobs are away, nothing is kept and nothing is left."""
    bench.documents.available = False
    with pytest.raises(Unavailable):
        await bench.add(BIG)
    bench.documents.available = True
    assert bench.blobs.stored() == {}
    with pytest.raises(ResponseNotFound):
        await bench.shelf.get("me", ID)
    bench.blobs.available = False
    with pytest.raises(Unavailable):
        await bench.add(BIG)
    with pytest.raises(ResponseNotFound):
        await bench.shelf.get("me", ID)


async def test_it_outlives_its_job(bench: Bench) -> None:
    """Once seen complete, a response is there when its job is not kept any more; what nobody saw is gone with the job."""

    class NoJobs:
        async def get(self, owner: str, job_id: str) -> Any:
            raise JobNotFound

    responses = ResponseService(
        NoJobs(), CallerTasks(), bench.shelf, bench.blobs, None, None, None, None, pause_s=1.0,  # type: ignore[arg-type]
    )  # fmt: skip
    kept = await bench.add()
    with pytest.raises(ResponseNotFound):
        await responses.retrieve("me", ID)
    for status in ("failed", "completed"):
        done = final_of(kept, status)
        await bench.shelf.finish(kept, done)
        assert await responses.retrieve("me", ID) == done
