"""What is stored of synchronous answers: each owner is bounded by its own limit."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import orjson
import pytest

from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.byte_quotas import MemoryByteQuotas
from gateway.answer_quotas import AnswerQuotas
from gateway.http.body_storage import BodyStorageFull
from gateway.signed_urls import url_blobs
from schemas.frames import BlobRef
from tests.conftest import Eventually


async def test_an_owners_oldest_urls_end_early(eventually: Eventually) -> None:
    """Those of others stay, and so does a blob of another owner that a worker's answer names."""
    blobs, urls = MemoryBlobStore(), MemoryByteQuotas()
    quotas = AnswerQuotas(urls, MemoryByteQuotas(), blobs, url_keep_s=60)

    async def answer(owner: str) -> str:
        writer = blobs.writer(ttl_s=60, owner=owner)
        await writer.write(b"x" * 1000)
        return (await writer.close()).name

    theirs = await answer("bob")
    quotas.count_urls("bob", 5000, orjson.dumps({"data": [{"url": "nexus-blob:" + theirs}]}))
    await eventually(lambda: not quotas._tasks)
    ours = []
    for _ in range(4):
        ours.append(await answer("alice"))
        both = [{"url": f"nexus-blob:{name}"} for name in (ours[-1], theirs)]
        quotas.count_urls("alice", 3 * 2024, orjson.dumps({"data": both}))
        await eventually(lambda: not quotas._tasks)
    there = [await blobs.info(name) is not None for name in ours]
    assert there == [False, True, True, True]
    assert await blobs.info(theirs) is not None
    quotas.count_urls("alice", None, orjson.dumps({"data": both}))
    assert not quotas._tasks
    await quotas.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"nexus-blob:", b'"nexus-blob:"', b'{"data": ["nexus-blob:"]}', b'{"data": [{"url": ["nexus-blob:"]}]}'],
)
def test_an_answer_of_another_form_leads_nowhere(answer: bytes) -> None:
    """A worker may answer anything."""
    assert url_blobs(answer) == []


async def test_unread_answers_are_bounded() -> None:
    """An owner's large answers count until they are sent; another owner's are sent meanwhile."""
    bodies = MemoryByteQuotas()
    quotas = AnswerQuotas(MemoryByteQuotas(), bodies, MemoryBlobStore(), url_keep_s=60)

    def sending(owner: str, name: str) -> AbstractAsyncContextManager[None]:
        return quotas.sending(owner, 1000, BlobRef(name=name, size=600))

    async with sending("alice", "w.a.key"), sending("bob", "w.b.key"):
        with pytest.raises(BodyStorageFull, match="Read the answers"):
            async with sending("alice", "w.c.key"):
                pass
    assert bodies.used("alice") == bodies.used("bob") == 0
