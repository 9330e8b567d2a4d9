"""Files of callers, without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.byte_quotas import MemoryByteQuotas
from backbone.testing.documents import MemoryDocumentStore
from gateway.app import make_app
from gateway.auth.authenticator import Authenticator, Principal
from gateway.dependencies import Parts
from gateway.files import MAX_NAME, FileNotFound, FileStore
from gateway.http.body_memory import BodyMemory
from gateway.limits.effective import EffectiveLimits
from schemas.errors import Unavailable
from schemas.files import UPLOAD_PURPOSES, FileRecord

KEY = "sk-test"
LIMIT = 300_000
KEEP_S = 86_400.0


class Gateway:
    """The routes of files, on memory."""

    def __init__(self) -> None:
        self.now = 0.0
        self.documents = MemoryDocumentStore(lambda: self.now)
        self.blobs = MemoryBlobStore()
        self.files = FileStore(
            self.documents, self.blobs, LIMIT, KEEP_S, BodyMemory(10_000_000), MemoryByteQuotas(), 5.0
        )
        app = make_app(cast("Parts", SimpleNamespace(files=self.files, auth=Authenticator(KEY))))
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers={"authorization": f"Bearer {KEY}"}
        )

    async def upload(self, data: bytes = b"hello", name: str = "a.txt", **fields: str) -> httpx.Response:
        fields = {"purpose": "user_data"} | fields
        return await self.http.post("/v1/files", files={"file": (name, data)}, data=fields)

    async def uploaded(self, data: bytes = b"hello", name: str = "a.txt", **fields: str) -> dict[str, Any]:
        answer = await self.upload(data, name, **fields)
        assert answer.status_code == 200, answer.text
        return cast("dict[str, Any]", answer.json())

    async def listed(self, query: str = "") -> dict[str, Any]:
        return cast("dict[str, Any]", (await self.http.get(f"/v1/files{query}")).json())


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    async with gateway.http:
        yield gateway


def refusal(answer: httpx.Response) -> tuple[int, str | None, str]:
    """Status, `param` and message."""
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


class TestUploads:
    async def test_a_file_comes_back_as_it_was(self, gateway: Gateway) -> None:
        """Whatever its bytes are; small ones are blobs too."""
        for data in (b"x", bytes(range(256)) * 1000, b"--boundary\r\n\r\n--"):
            file = await gateway.uploaded(data, "data.bin")
            content = await gateway.http.get(f"/v1/files/{file['id']}/content")
            assert content.content == data
            assert content.headers["content-length"] == str(len(data)) == str(file["bytes"])
        assert len(gateway.blobs.chunks_by_name()) == 3

    async def test_the_file_object_is_openais(self, gateway: Gateway) -> None:
        """All of its fields, and when it ends."""
        file = await gateway.uploaded(purpose="batch")
        assert await gateway.http.get(f"/v1/files/{file['id']}") is not None
        assert {**file, "id": 0, "created_at": 0, "expires_at": 0} == {
            "id": 0,
            "object": "file",
            "bytes": 5,
            "created_at": 0,
            "expires_at": 0,
            "filename": "a.txt",
            "purpose": "batch",
            "status": "processed",
            "status_details": None,
        }
        assert file["id"].startswith("file-")
        assert len(file["id"]) == 37
        assert file["expires_at"] - file["created_at"] == KEEP_S

    async def test_a_shorter_lifetime_is_honored(self, gateway: Gateway) -> None:
        """`expires_after` as the SDKs send it; a longer one than files are kept is cut."""
        wanted: dict[str, Any] = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        file = await gateway.uploaded(**wanted)
        assert file["expires_at"] - file["created_at"] == 3600
        longest = await gateway.uploaded(**(wanted | {"expires_after[seconds]": "2592000"}))
        assert longest["expires_at"] - longest["created_at"] == KEEP_S
        gateway.now = 3601.0
        gone = await gateway.http.get(f"/v1/files/{file['id']}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "file_not_found")
        assert [one["id"] for one in (await gateway.listed())["data"]] == [longest["id"]]

    @pytest.mark.parametrize(
        ("sent", "kept"),
        [
            ("with blanks  inside.txt", "with blanks  inside.txt"),
            ("日本語.txt", "日本語.txt"),
            ("👩‍💻.txt", "👩‍💻.txt"),
            ("../../etc/passwd", "passwd"),
            ("C:\\temp\\in.jsonl", "in.jsonl"),
            ("it's; odd=1.txt", "it's; odd=1.txt"),
            ("a" * MAX_NAME, "a" * MAX_NAME),
        ],
    )
    async def test_odd_names(self, gateway: Gateway, sent: str, kept: str) -> None:
        """A path's last part; anything that a file system would take."""
        file = await gateway.uploaded(name=sent)
        assert file["filename"] == kept
        content = await gateway.http.get(f"/v1/files/{file['id']}/content")
        assert content.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")

    @pytest.mark.parametrize(
        ("fields", "name", "data", "param"),
        [
            ({"purpose": ""}, "a", b"x", "purpose"),
            ({"purpose": "batch_output"}, "a", b"x", "purpose"),
            ({"purpose": "nonsense"}, "a", b"x", "purpose"),
            ({"expires_after[anchor]": "created_at"}, "a", b"x", "expires_after.seconds"),
            ({"expires_after[seconds]": "7200"}, "a", b"x", "expires_after.anchor"),
            (
                {"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
                "a",
                b"x",
                "expires_after.seconds",
            ),
            ({"expires_after": "7200"}, "a", b"x", "expires_after"),
            ({}, "a", b"", "file"),
            ({}, "a" * (MAX_NAME + 1), b"x", "file"),
            ({}, "..", b"x", "file"),
            ({}, "a\u2028b", b"x", "file"),
        ],
    )
    async def test_an_invalid_upload_stores_nothing(
        self, gateway: Gateway, fields: dict[str, str], name: str, data: bytes, param: str
    ) -> None:
        """400, the field by name, and no bytes stored."""
        answer = await gateway.upload(data, name, **fields)
        assert refusal(answer)[:2] == (400, param), answer.text
        assert gateway.blobs.chunks_by_name() == {}
        assert (await gateway.listed())["data"] == []

    async def test_what_a_form_lacks(self, gateway: Gateway) -> None:
        """No purpose, no file, two files, no form."""
        post = gateway.http.post
        assert refusal(await post("/v1/files", files={"file": ("a", b"x")}))[:2] == (400, "purpose")
        answer = await post("/v1/files", files={"other": (None, b"x")}, data={"purpose": "batch"})
        assert refusal(answer)[:2] == (400, "file")
        two = [("file", ("a", b"x")), ("file", ("b", b"y"))]
        assert refusal(await post("/v1/files", files=two, data={"purpose": "batch"}))[:2] == (400, "file")
        status, _, message = refusal(await post("/v1/files", json={"purpose": "batch"}))
        assert status == 400
        assert "multipart/form-data" in message
        assert gateway.blobs.chunks_by_name() == {}

    async def test_too_large(self, gateway: Gateway) -> None:
        """413 as soon as it is known, and nothing is left."""
        assert (await gateway.upload(b"x" * LIMIT)).status_code == 200
        assert (await gateway.upload(b"x" * (LIMIT + 1))).status_code == 413
        assert (await gateway.upload(b"x" * (2 * LIMIT))).status_code == 413
        assert len(gateway.blobs.chunks_by_name()) == 1

    async def test_while_the_store_is_unavailable(self, gateway: Gateway) -> None:
        """503, and the bytes are removed again."""
        gateway.documents.available = False
        assert (await gateway.upload()).status_code == 503
        assert gateway.blobs.chunks_by_name() == {}


class TestLists:
    async def test_pages_end(self, gateway: Gateway) -> None:
        """From either end, and each file once."""
        made = sorted([(await gateway.uploaded(name=f"{n}"))["id"] for n in range(7)])
        for order, wanted in (("asc", made), ("desc", made[::-1])):
            seen: list[str] = []
            more, after = True, ""
            while more:
                page = await gateway.listed(f"?limit=3&order={order}" + (f"&after={after}" if after else ""))
                ids = [file["id"] for file in page["data"]]
                assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[0], ids[-1])
                seen, more, after = seen + ids, page["has_more"], ids[-1]
            assert seen == wanted

    async def test_an_exact_page_is_the_last(self, gateway: Gateway) -> None:
        """`has_more` does not promise an empty page."""
        for _ in range(3):
            await gateway.uploaded()
        assert (await gateway.listed("?limit=3"))["has_more"] is False
        assert (await gateway.listed("?limit=2"))["has_more"] is True

    async def test_by_purpose(self, gateway: Gateway) -> None:
        """Only those, however many others there are between them."""
        wanted = [(await gateway.uploaded(purpose="batch"))["id"]]
        for _ in range(5):
            await gateway.uploaded(purpose="vision")
        wanted.append((await gateway.uploaded(purpose="batch"))["id"])
        page = await gateway.listed("?purpose=batch&limit=2")
        assert sorted(file["id"] for file in page["data"]) == sorted(wanted)
        assert page["has_more"] is False
        assert (await gateway.listed("?purpose=batch&limit=1"))["has_more"] is True

    @pytest.mark.parametrize("query", ["?limit=0", "?limit=10001", "?limit=x", "?order=up", "?after=" + "x" * 101])
    async def test_wrong_queries(self, gateway: Gateway, query: str) -> None:
        """400, which names the parameter."""
        status, param, _ = refusal(await gateway.http.get(f"/v1/files{query}"))
        assert (status, param) == (400, query[1:].partition("=")[0])

    async def test_nothing(self, gateway: Gateway) -> None:
        """An empty list is a list."""
        empty: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        assert await gateway.listed() == empty


class TestRemoval:
    async def test_bytes_go_with_the_file(self, gateway: Gateway) -> None:
        """And it is not found any more."""
        file = await gateway.uploaded()
        answer = await gateway.http.delete(f"/v1/files/{file['id']}")
        assert answer.json() == {"id": file["id"], "object": "file", "deleted": True}
        assert gateway.blobs.chunks_by_name() == {}
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            answer = await gateway.http.request(method, f"/v1/files/{file['id']}{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_not_found")

    async def test_lost_bytes_are_reported(self, gateway: Gateway) -> None:
        """A status, not an answer that breaks off."""
        file = await gateway.uploaded()
        for name in gateway.blobs.chunks_by_name():
            gateway.blobs.remove(name)
        answer = await gateway.http.get(f"/v1/files/{file['id']}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "content_gone")


class TestOwners:
    async def test_another_owners_file_does_not_exist(self, gateway: Gateway) -> None:
        """It is neither opened nor removed nor listed."""
        record = await keep(gateway.files, "alice", b"hers")
        with pytest.raises(FileNotFound):
            await gateway.files.open("bob", record.id)
        with pytest.raises(FileNotFound):
            await gateway.files.remove("bob", record.id)
        assert await gateway.files.page("bob", after="", limit=10, newest_first=True, purpose="") == ([], False)
        assert (await gateway.files.open("alice", record.id)) == record

    async def test_a_key_without_the_scope_is_refused(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        """403, before anything is read."""
        monkeypatch.setattr(Authenticator, "authenticate", lambda *_: Principal("alice", scopes=frozenset()))
        assert (await gateway.upload()).status_code == 403
        assert (await gateway.http.get("/v1/files")).status_code == 403


class TestReplacing:
    async def test_the_same_id_is_one_file(self, gateway: Gateway) -> None:
        """What a batch writes twice is there once, and the first bytes are removed."""
        first = await keep(gateway.files, "alice", b"half", "file-1")
        second = await keep(gateway.files, "alice", b"whole", "file-1")
        assert (first.id, first.blob) != (second.id, second.blob)
        found, _ = await gateway.files.page("alice", after="", limit=10, newest_first=True, purpose="")
        assert found == [second]
        assert list(gateway.blobs.chunks_by_name()) == [second.blob]


async def keep(files: FileStore, owner: str, data: bytes, file_id: str = "") -> FileRecord:
    writer = files.writer(owner, 60)
    await writer.write(data)
    blob = await writer.close()
    return await files.add(
        owner, blob=blob.name, size=blob.size, filename="a", purpose="batch_output", keep_s=60, file_id=file_id
    )


def test_purposes_are_openais() -> None:
    """As the SDK lists them."""
    from typing import get_args

    from openai.types.file_purpose import FilePurpose

    assert set(UPLOAD_PURPOSES) == set(get_args(FilePurpose))


async def test_a_store_that_fails_between_bytes_and_record(gateway: Gateway) -> None:
    """A file is there whole or not at all."""
    writer = gateway.files.writer("alice", 60)
    await writer.write(b"x")
    blob = await writer.close()
    gateway.documents.available = False
    with pytest.raises(Unavailable):
        await gateway.files.add("alice", blob=blob.name, size=1, filename="a", purpose="batch", keep_s=60)
    gateway.documents.available = True
    assert await gateway.files.page("alice", after="", limit=10, newest_first=True, purpose="") == ([], False)


class TestQuotas:
    async def test_a_team_stores_so_many_bytes(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        """What does not fit is refused while it arrives, and leaves nothing; a deleted or expired file makes room."""
        caller = Principal("alice", limits=EffectiveLimits(stored_bytes=10_000))
        monkeypatch.setattr(Authenticator, "authenticate", lambda *_: caller)
        first = await gateway.uploaded(b"x" * 5000)
        refused = await gateway.upload(b"x" * 6000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "storage_limit_reached")
        assert len(gateway.blobs.chunks_by_name()) == 1
        caller = Principal("bob", limits=caller.limits)
        await gateway.uploaded(b"x" * 6000)
        caller = Principal("alice", limits=caller.limits)
        await gateway.http.delete(f"/v1/files/{first['id']}")
        await gateway.uploaded(b"x" * 6000)
