"""OpenAI's Files API with the official SDK for Python: changed only in `base_url`."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def sync_client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


async def key_of(cluster: Cluster, owner: str) -> str:
    """A key of somebody else."""
    answer = await cluster.post("/v1/keys", {"name": f"{owner}-{os.urandom(4).hex()}", "owner": owner})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["key"])


class TestUploads:
    async def test_twenty_megabytes_come_back_byte_for_byte(self, client: AsyncOpenAI) -> None:
        """Uploaded, described, read, and read as a stream."""
        data = os.urandom(20_000_000)
        file = await client.files.create(file=("random bytes.bin", data), purpose="user_data")
        assert (file.object, file.bytes, file.filename) == ("file", len(data), "random bytes.bin")
        assert (file.purpose, file.status) == ("user_data", "processed")
        assert file.expires_at is not None
        assert abs(file.created_at - time.time()) < 60
        assert await client.files.retrieve(file.id) == file
        assert (await client.files.content(file.id)).content == data
        async with client.files.with_streaming_response.content(file.id) as response:
            assert response.headers["content-length"] == str(len(data))
            assert b"".join([piece async for piece in response.iter_bytes()]) == data

    async def test_as_the_sdk_takes_files(self, client: AsyncOpenAI, tmp_path: Path) -> None:
        """A path, an open file, bytes, a stream in memory."""
        path = tmp_path / "naïve file.txt"
        path.write_bytes(b"from a path")
        for given, name, data in (
            (path, "naïve file.txt", b"from a path"),
            (path.open("rb"), "naïve file.txt", b"from a path"),
            (io.BytesIO(b"in memory"), "upload", b"in memory"),
            (b"bytes", "upload", b"bytes"),
        ):
            file = await client.files.create(file=given, purpose="user_data")
            assert file.filename == name
            assert (await client.files.content(file.id)).read() == data

    async def test_synchronously(self, sync_client: OpenAI) -> None:
        """The other client of the SDK."""

        def use() -> None:
            file = sync_client.files.create(file=("a.txt", b"hello"), purpose="assistants")
            assert sync_client.files.wait_for_processing(file.id).status == "processed"
            assert sync_client.files.content(file.id).text == "hello"
            assert sync_client.files.delete(file.id).deleted

        await asyncio.to_thread(use)

    async def test_a_shorter_life(self, client: AsyncOpenAI) -> None:
        """`expires_after`, as the SDK sends it."""
        file = await client.files.create(
            file=("a.txt", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at == file.created_at + 3600

    async def test_without_a_content_length(self, cluster: Cluster, client: AsyncOpenAI) -> None:
        """A form in chunks, the file before its fields, as `curl -T` and browsers may send it."""
        data = os.urandom(1_000_000)
        head = b'--XX\r\ncontent-disposition: form-data; name="file"; filename="c.bin"\r\n\r\n'
        tail = b'\r\n--XX\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--XX--\r\n'

        async def body() -> AsyncIterator[bytes]:
            yield head
            for at in range(0, len(data), 77_777):
                yield data[at : at + 77_777]
            yield tail

        headers = {"content-type": "multipart/form-data; boundary=XX"}
        answer = await cluster.http.post(cluster.url + "/v1/files", content=body(), headers=headers)
        assert answer.status_code == 200, answer.text
        assert (await client.files.content(answer.json()["id"])).content == data

    @pytest.mark.parametrize("purpose", ["nonsense", "batch_output"])
    async def test_a_purpose_that_is_none(self, client: AsyncOpenAI, purpose: str) -> None:
        """400, which names it."""
        with pytest.raises(openai.BadRequestError) as raised:
            await client.files.create(file=("a", b"x"), purpose=purpose)
        assert raised.value.param == "purpose"

    async def test_an_empty_file(self, client: AsyncOpenAI) -> None:
        """400, which names it."""
        with pytest.raises(openai.BadRequestError) as raised:
            await client.files.create(file=("a", b""), purpose="batch")
        assert raised.value.param == "file"

    async def test_no_form(self, cluster: Cluster) -> None:
        """What `curl -d` sends."""
        url = cluster.url + "/v1/files"
        for answer in (
            await cluster.http.post(url, content=b"purpose=batch"),
            await cluster.http.post(url, data={"purpose": "batch"}),
            await cluster.http.post(url),
        ):
            assert answer.status_code == 400
            assert "multipart/form-data" in answer.json()["error"]["message"]

    async def test_a_caller_who_hangs_up(self, cluster: Cluster) -> None:
        """Nothing is left of half an upload."""
        before = {file["id"] for file in (await cluster.get("/v1/files")).json()["data"]}

        async def body() -> AsyncIterator[bytes]:
            yield b'--XX\r\ncontent-disposition: form-data; name="file"; filename="c.bin"\r\n\r\n' + b"x" * 300_000
            raise ConnectionError

        with pytest.raises((ConnectionError, httpx.HTTPError)):
            await cluster.http.post(
                cluster.url + "/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=XX"}
            )
        assert {file["id"] for file in (await cluster.get("/v1/files")).json()["data"]} == before


class TestLists:
    async def test_pages_end(self, cluster: Cluster) -> None:
        """The SDK walks through all of them, from either end, and meets each file once."""
        key = await key_of(cluster, "lister")
        async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=key, max_retries=0) as client:
            assert (await client.files.list()).data == []
            purposes = ["batch", "vision"] * 4
            made = [await client.files.create(file=("a", b"x"), purpose=purpose) for purpose in purposes]
            ids = sorted(file.id for file in made)
            assert [file.id async for file in client.files.list(limit=3, order="asc")] == ids
            assert [file.id async for file in client.files.list(limit=4)] == ids[::-1]
            batch = [file.id async for file in client.files.list(limit=1, purpose="batch")]
            assert sorted(batch) == sorted(file.id for file in made if file.purpose == "batch")

    async def test_wrong_queries(self, client: AsyncOpenAI) -> None:
        """400."""
        with pytest.raises(openai.BadRequestError):
            await client.files.list(limit=0)


class TestRemoval:
    async def test_a_removed_file_is_gone(self, client: AsyncOpenAI) -> None:
        """Whatever is asked of it."""
        file = await client.files.create(file=("a", b"x"), purpose="user_data")
        removed = await client.files.delete(file.id)
        assert (removed.id, removed.object, removed.deleted) == (file.id, "file", True)
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as raised:
                await ask(file.id)
            assert raised.value.code == "file_not_found"

    async def test_another_owners_file_does_not_exist(self, cluster: Cluster, client: AsyncOpenAI) -> None:
        """Whatever is asked of it; and it stays."""
        file = await client.files.create(file=("a", b"mine"), purpose="user_data")
        async with AsyncOpenAI(
            base_url=cluster.url + "/v1", api_key=await key_of(cluster, "stranger"), max_retries=0
        ) as stranger:
            for ask in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await ask(file.id)
            assert file.id not in [one.id async for one in stranger.files.list()]
        assert (await client.files.content(file.id)).content == b"mine"


async def test_too_large(cluster: Cluster) -> None:
    """413 by its announced length, before it is sent."""
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: multipart/form-data; boundary=XX\r\ncontent-length: {600 * 1024**2}\r\n\r\n"
    writer.write(head.encode())
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 413")
    assert '"code":"request_too_large"' in answer
