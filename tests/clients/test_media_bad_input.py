"""Embeddings, pictures, sound and rerank, from callers who are wrong, odd, hostile, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
import pytest_asyncio

from tests.clients.test_bad_input import BAD_BODIES, LARGE, MIB, Wire, check_error, exchange, head, wire, works
from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

EMBEDDINGS, IMAGES, EDITS = "/v1/embeddings", "/v1/images/generations", "/v1/images/edits"
SPEECH, RERANK, PULL = "/v1/audio/speech", "/v1/rerank", "/v1/models/pull"
TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
GOOD: dict[str, dict[str, Any]] = {
    EMBEDDINGS: {"model": "echo", "input": "hello"},
    IMAGES: {"model": "echo", "prompt": "a cat"},
    SPEECH: {"model": "echo", "input": "hello", "voice": "alloy", "response_format": "wav"},
    RERANK: {"model": "echo", "query": "tea", "documents": ["tea", "coffee"]},
}
FORMS = {TRANSCRIPTIONS: "file", TRANSLATIONS: "file", EDITS: "image"}
"""Each with the file that it needs."""
SOUND = b"RIFF and what follows"
HEARD = hashlib.sha256(SOUND).hexdigest()
BOUNDARY = "nexus-test"
FORM_TYPE = f"content-type: multipart/form-data; boundary={BOUNDARY}"
HUGE = "x" * 40_000
Count = Callable[[], Awaitable[int]]
NO_TEXT: list[Any] = ["", [], None, 5, 1.5, True, {"a": 1}]

# endpoint -> field -> values of it that are wrong, and what `param` says where it is not the field itself
WRONG: dict[str, dict[str, list[tuple[Any, str]]]] = {
    EMBEDDINGS: {
        "model": [(None, ""), ("", ""), (5, ""), ("x" * 257, "")],
        "input": [
            *[(wrong, "") for wrong in NO_TEXT],
            *[([wrong], "input.0") for wrong in NO_TEXT if wrong != 5],
            (["x", 5], "input.1"),
            ([1, "x"], "input.0"),
            ([[1, "x"]], "input.0.1"),
        ],
        "encoding_format": [("hex", ""), (5, "")],
        "dimensions": [(0, ""), (-1, ""), ("5", ""), (1.5, ""), (10**30, ""), (10**9, "")],
        "stream": [(True, "")],
        "user": [(5, "")],
    },
    IMAGES: {
        "model": [("", ""), (5, "")],
        "prompt": [("", ""), (" ", ""), (None, ""), (5, ""), (["x"], ""), (HUGE, "")],
        "n": [(0, ""), (11, ""), (-1, ""), ("2", ""), (1.5, ""), (10**30, ""), (True, "")],
        "size": [(size, "") for size in ("", "1024", "0x0", "axb", "1024x", "99999x99999", "1x1x1", "x" * 10_000, 5)],
        "seed": [(-2, ""), (2**64, ""), (1.5, ""), ("7", "")],
        "response_format": [("png", ""), (5, "")],
        "output_format": [("gif", "")],
        "output_compression": [(101, ""), (-1, ""), ("x", "")],
        "partial_images": [(-1, ""), (4, "")],
        "stream": [("true", ""), (1, "")],
        "steps": [(0, ""), ("x", "")],
        "style": [("vivid", "")],
        "background": [("transparent", "")],
        "echo": [({"size": -1}, "echo.size"), ({"none": 1}, "echo.none")],
    },
    SPEECH: {
        "model": [(None, ""), ("", "")],
        "input": [("", ""), (" \n", ""), (None, ""), (5, ""), (["x"], ""), (HUGE, "")],
        "voice": [(5, ""), ([], ""), ({}, "voice.id"), ({"id": ""}, "voice.id"), ({"id": 5}, "voice.id")],
        "response_format": [("ogg", ""), ("MP3", ""), (5, "")],
        "speed": [(0, ""), (4.1, ""), (-1, ""), ("1", ""), (True, "")],
        "stream_format": [("x", ""), (5, "")],
        "instructions": [(5, "")],
        "service_tier": [("gold", "")],
    },
    RERANK: {
        "model": [(None, ""), ("", "")],
        "query": [("", ""), (None, ""), (5, ""), ({"text": "x"}, "")],
        "documents": [
            ([], ""),
            (None, ""),
            ("x", ""),
            ([5], "documents.0"),
            (["x", None], "documents.1"),
            ([{}], "documents.0.text"),
            ([{"text": 5}], "documents.0.text"),
        ],
        "top_n": [(0, ""), (-1, ""), ("1", ""), (1.5, "")],
        "return_documents": [("yes", "")],
        "stream": [(True, "")],
    },
}
WRONG_FORMS: dict[str, dict[str, list[Any]]] = {
    TRANSCRIPTIONS: {
        "model": ["", ["echo", "echo"], "x" * 257],
        "response_format": ["xml", "diarized_json"],
        "temperature": ["warm", "-1", "2", "nan", "inf", "1e999"],
        "stream": ["maybe"],
        "language": ["x" * 100],
        "service_tier": ["gold"],
        "timestamp_granularities": ["word"],  # only verbose_json has them
        "prompt": [HUGE * 30],
    },
    EDITS: {
        "prompt": ["", " ", ["x", "y"], HUGE],
        "n": ["0", "11", "two", "1.5", "nan", "9" * 5000],
        "size": ["huge", "0x0", "99999x99999"],
        "seed": ["-5", "x", "1e400", "9" * 40],
        "strength": ["nan", "2", "x"],
        "partial_images": ["4"],
        "stream": ["maybe"],
        "response_format": ["png"],
        "mask_strength": ["1"],
    },
}


def part(name: str, data: bytes, filename: str | None = None, *lines: str) -> bytes:
    """One part of a form."""
    disposition = f'content-disposition: form-data; name="{name}"'
    disposition += f'; filename="{filename}"' if filename is not None else ""
    return "\r\n".join([f"--{BOUNDARY}", disposition, *lines, "", ""]).encode() + data + b"\r\n"


MODEL = part("model", b"echo")
FILE = part("file", SOUND, "a.wav", "content-type: audio/wav")
END = f"--{BOUNDARY}--\r\n".encode()
FORM = MODEL + FILE + END


def upload(body: bytes = FORM, *lines: str, path: str = TRANSCRIPTIONS, kind: str = FORM_TYPE, **options: str) -> bytes:
    """A whole request with a form."""
    return head(kind, *lines, f"content-length: {len(body)}", path=path, **options) + body


async def send_form(cluster: Cluster, path: str, fields: dict[str, Any], **files: Any) -> httpx.Response:
    """A form as httpx sends it, complete but for what `fields` and `files` say."""
    given: dict[str, Any] = {FORMS[path]: ("a", SOUND)} | files
    plain = {"model": "echo"} | ({"prompt": "x"} if path == EDITS else {}) | fields
    return await cluster.http.post(cluster.url + path, data=plain, files={k: v for k, v in given.items() if v})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def blobs(cluster: Cluster) -> AsyncIterator[Count]:
    """How many messages the store of blobs holds."""
    client = await nats.connect(cluster.nats.url)

    async def stored() -> int:
        return (await client.jetstream().stream_info("OBJ_nexus-blobs")).state.messages

    yield stored
    await client.close()


@pytest_asyncio.fixture(loop_scope="session")
async def nothing_left(blobs: Count, eventually: Any) -> AsyncIterator[None]:
    """After the test the store of blobs holds no more than before; what is removed, is removed after the answer."""
    before = await blobs()
    yield

    async def gone() -> bool:
        return await blobs() <= before

    await eventually(gone)


class TestJson:
    @pytest.mark.parametrize("path", [*GOOD, PULL])
    async def test_what_is_not_a_json_object_is_refused(self, cluster: Cluster, path: str) -> None:
        """Whatever is sent instead of a JSON object gets a 400 that says what is wrong."""
        for body in BAD_BODIES.values():
            answer = await exchange(cluster.url, head(f"content-length: {len(body)}", path=path) + body)
            assert check_error(answer, 400)["type"] == "invalid_request_error"

    @pytest.mark.parametrize("path", GOOD)
    async def test_a_form_is_no_json(self, cluster: Cluster, path: str) -> None:
        """A form where JSON is meant is a 400."""
        assert "JSON" in check_error(await exchange(cluster.url, upload(path=path)), 400)["message"]

    @pytest.mark.parametrize(("path", "name"), [(path, name) for path, fields in WRONG.items() for name in fields])
    async def test_a_wrong_field_is_named(self, cluster: Cluster, path: str, name: str) -> None:
        """A field of the wrong type or range gets a 400 whose `param` is its place in the request."""
        for value, place in WRONG[path][name]:
            error = check_error(await cluster.post(path, GOOD[path] | {name: value}), 400)
            assert (error["param"], error["type"]) == (place or name, "invalid_request_error"), error
        if name in GOOD[path] and name not in ("voice", "response_format") and (path, name) != (IMAGES, "model"):
            without = {key: kept for key, kept in GOOD[path].items() if key != name}
            assert check_error(await cluster.post(path, without), 400)["param"] == name

    @pytest.mark.parametrize("path", GOOD)
    async def test_null_is_as_good_as_absent(self, cluster: Cluster, path: str) -> None:
        """Optional fields may be null."""
        nulls = dict.fromkeys(set(WRONG[path]) - set(GOOD[path]))
        assert (await cluster.post(path, GOOD[path] | nulls)).status_code == 200

    @pytest.mark.parametrize("path", [*GOOD, *FORMS, PULL])
    async def test_other_methods(self, cluster: Cluster, path: str) -> None:
        """Where only POST is served, others are 405 and are told so; a browser's preflight is answered."""
        for method in ("PUT", "PATCH", "DELETE") if path == PULL else ("GET", "PUT", "PATCH", "DELETE"):
            answer = await exchange(cluster.url, head("content-length: 0", method=method, path=path))
            if path != PULL:
                check_error(answer, 405, "method_not_allowed")
                assert "POST" in answer.headers["allow"]
            else:
                check_error(answer, answer.status)
        assert (await exchange(cluster.url, head("content-length: 0", method="OPTIONS", path=path))).status == 204

    @pytest.mark.usefixtures("nothing_left")
    @pytest.mark.parametrize("path", [*GOOD, *FORMS])
    async def test_a_model_that_nobody_serves(self, cluster: Cluster, path: str) -> None:
        """An unknown model is 404 `model_not_found`, also after an upload, of which nothing is left."""
        if path in GOOD:
            answer = await cluster.post(path, GOOD[path] | {"model": "none"})
        else:
            answer = await send_form(cluster, path, {"model": "none"}, **{FORMS[path]: ("a", bytes(MIB))})
        assert check_error(answer, 404, "model_not_found")["param"] == "model"


class TestForms:
    @pytest.mark.parametrize("path", FORMS)
    @pytest.mark.parametrize(
        "kind",
        [
            "x-no: content-type",
            "content-type: application/json",
            "content-type: application/x-www-form-urlencoded",
            "content-type: multipart/form-data",
            "content-type: multipart/form-data; boundary=",
            "content-type: multipart/mixed; boundary=" + BOUNDARY,
            "content-type: multipart/form-data; boundary=" + "x" * 5000,
            "content-type: \xff\xfe;;=",
        ],
    )
    async def test_what_says_that_it_is_no_form(self, cluster: Cluster, path: str, kind: str) -> None:
        """Another content type, or none, is a 400 that says what to send."""
        check_error(await exchange(cluster.url, upload(path=path, kind=kind)), 400)

    @pytest.mark.usefixtures("nothing_left")
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"", "ended before"),
            (b"nonsense", "not a valid multipart form"),
            (json.dumps(GOOD[EMBEDDINGS]).encode(), "not a valid multipart form"),
            (END, "file"),
            (FORM.replace(BOUNDARY.encode(), b"another"), "not a valid multipart form"),
            (MODEL + FILE, "ended before"),
            (MODEL + FILE[:-10], "ended before"),
            (FORM[:-4], "ended before"),
            (MODEL + END, "lacks the file 'file'"),
            (MODEL + part("sound", SOUND, "a.wav") + END, "'sound' is not a file of this endpoint. It accepts file"),
            (MODEL + part("file", b"", "") + END, "is empty"),
            (MODEL + part("", SOUND, "a.wav") + END, "no name"),
            (MODEL + FILE.replace(b"content-disposition", b"content-x") + END, "no name"),
            (MODEL + FILE.replace(b"form-data;", b"\xff\xfe;\x80") + END, "no name"),
            (MODEL + part("language", b"\xff\xfe") + FILE + END, "UTF-8"),
            (MODEL + part("file", SOUND, "a" * 20_000) + END, ""),
            (MODEL + part("file", SOUND, "a", *[f"x-{n}: 1" for n in range(1000)]) + END, ""),
            (part("a", b"") * 100_000 + END, "more than 128 parts"),
            (part("a", b"x" * 2_000_000) + END, "larger than"),
            (FILE + END, "model"),
        ],
    )  # fmt: skip
    async def test_what_is_no_form(self, cluster: Cluster, body: bytes, message: str) -> None:
        """Whatever is wrong with a form gets a 400 that says what."""
        error = check_error(await exchange(cluster.url, upload(body)), 400)
        assert message in error["message"]

    async def test_it_is_told_to_the_caller_only(self, cluster: Cluster) -> None:
        """What is wrong with a form is no concern of who reads the gateway's log."""

        def warnings() -> int:
            return sum(event["level"] == "warning" for event in cluster.log_events(cluster.gateways[0]))

        before = warnings()
        check_error(await exchange(cluster.url, upload(b"nonsense")), 400)
        assert warnings() == before

    @pytest.mark.parametrize(
        ("path", "name"), [(path, name) for path, fields in WRONG_FORMS.items() for name in fields]
    )
    async def test_a_wrong_field_is_named(self, cluster: Cluster, path: str, name: str) -> None:
        """As in JSON; numbers that are none, and numbers out of range too."""
        for value in WRONG_FORMS[path][name]:
            error = check_error(await send_form(cluster, path, {name: value}), 400)
            assert (error["param"] or "").partition(".")[0] == name, error

    @pytest.mark.parametrize("path", FORMS)
    async def test_a_form_without_its_file(self, cluster: Cluster, path: str) -> None:
        """No file, or an empty one, is a 400 that names it."""
        name = FORMS[path]
        missing = await send_form(cluster, path, {}, **{name: None, "x": (None, b"1")})
        empty = await send_form(cluster, path, {}, **{name: ("a.wav", b"")})
        for answer in (missing, empty):
            assert check_error(answer, 400)["param"] == name

    async def test_empty_fields_count_as_not_given(self, cluster: Cluster) -> None:
        """A form in a browser sends the fields that nobody filled in."""
        empty = dict.fromkeys(("language", "prompt", "response_format", "temperature", "stream"), "")
        assert (await send_form(cluster, TRANSCRIPTIONS, empty)).status_code == 200
        empty = dict.fromkeys(("n", "size", "seed", "stream", "response_format", "quality"), "")
        assert (await send_form(cluster, EDITS, empty)).status_code == 200

    async def test_names_of_files_are_only_names(self, cluster: Cluster) -> None:
        """A file's name may hold anything: it is no path, no header and no end of a line."""
        for name in ("../../etc/passwd", 'a"b\\c', "日本.wav", "%0d%0ax-evil: 1", "\t", "x" * 200, ""):
            answer = await exchange(cluster.url, upload(MODEL + part("file", SOUND, name.replace('"', "%22")) + END))
            assert answer.status == 200, answer
            assert HEARD in answer.json["text"]
        for line in ("filename*=UTF-8''%E6%97%A5.wav", "filename=plain.wav", 'filename="a.wav"; filename*=x'):
            body = FORM.replace(b'filename="a.wav"', line.encode())
            assert HEARD in (await exchange(cluster.url, upload(body))).json["text"]


class TestSize:
    @pytest.mark.usefixtures("nothing_left")
    @pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "chunked"])
    async def test_a_huge_upload_is_refused_before_its_end(self, cluster: Cluster, chunked: bool) -> None:
        """An upload over the limit is 413 as soon as that is known, and nothing of it is kept."""
        piece = bytes(65536)
        framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
        begin = FORM[: FORM.index(SOUND)]
        sent = 0

        async def send(connection: Wire) -> None:
            nonlocal sent
            with contextlib.suppress(ConnectionError):
                await connection.send(b"%x\r\n%b\r\n" % (len(begin), begin) if chunked else begin)
                while sent < LARGE:
                    await connection.send(framed)
                    sent += len(piece)

        async with wire(cluster.url) as connection:
            length = "transfer-encoding: chunked" if chunked else f"content-length: {LARGE}"
            await connection.send(head(length, FORM_TYPE, path=TRANSCRIPTIONS))
            sending = asyncio.create_task(send(connection))
            answer = await connection.answer()
            assert await connection.ended()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        check_error(answer, 413, "request_too_large")
        assert answer.headers["connection"] == "close"
        assert sent < LARGE / 2
        await works(cluster)

    @pytest.mark.parametrize("path", [EMBEDDINGS, IMAGES, SPEECH, RERANK])
    async def test_huge_json(self, cluster: Cluster, path: str) -> None:
        """JSON has the same limit, and is not waited for."""
        check_error(await exchange(cluster.url, head(f"content-length: {LARGE}", path=path)), 413, "request_too_large")


class TestKeys:
    @pytest.mark.parametrize("path", [*GOOD, *FORMS, PULL])
    @pytest.mark.parametrize("lines", [(), ("expect: 100-continue",)], ids=["at once", "asks first"])
    async def test_the_key_comes_before_the_upload(self, cluster: Cluster, path: str, lines: tuple[str, ...]) -> None:
        """A stranger's 25 MB are not read, not even waited for, and never asked for."""
        stranger = head(FORM_TYPE, f"content-length: {25 * MIB}", *lines, path=path, key="wrong")
        check_error(await exchange(cluster.url, stranger), 401, "invalid_api_key")

    async def test_a_strangers_connection_goes_on(self, cluster: Cluster) -> None:
        """What a stranger sends after the 401 is its body, and the next request on the connection is a request."""
        async with wire(cluster.url) as connection:
            await connection.send(head(FORM_TYPE, f"content-length: {MIB}", path=TRANSCRIPTIONS, key="wrong"))
            check_error(await connection.answer(), 401)
            await connection.send(bytes(MIB) + upload())
            assert HEARD in (await connection.answer()).json["text"]


class TestGone:
    async def test_a_caller_who_hangs_up_in_an_upload(self, cluster: Cluster, blobs: Count, eventually: Any) -> None:
        """An upload that breaks off leaves no job, and of what had arrived nothing."""
        before = await blobs()
        begin = FORM[: FORM.index(SOUND)]
        requests = len(cluster.requests())
        async with wire(cluster.url) as connection:
            await connection.send(head(FORM_TYPE, f"content-length: {10 * MIB}", path=TRANSCRIPTIONS))
            await connection.send(begin + bytes(3 * MIB))

            async def kept() -> bool:
                return await blobs() > before

            await eventually(kept)

        async def gone() -> bool:
            return await blobs() <= before and await cluster.stored("echo") == 0

        hung_up = await eventually(lambda: [one for one in cluster.requests()[requests:] if one["status"] == 499])
        assert "job" not in hung_up[0]
        await eventually(gone)

    async def test_an_upload_that_stops(self, impatient_url: str) -> None:
        """An upload that does not go on is 408, and the connection ends."""
        async with wire(impatient_url) as connection:
            await connection.send(head(FORM_TYPE, f"content-length: {10 * MIB}", path=TRANSCRIPTIONS))
            await connection.send(FORM[: FORM.index(SOUND)])
            check_error(await connection.answer(), 408, "request_timeout")
            assert await connection.ended()

    async def test_a_caller_who_hangs_up_after_an_upload(self, cluster: Cluster, blobs: Count, eventually: Any) -> None:
        """A caller who leaves while the work goes on stops it; the upload is removed."""
        before = await blobs()
        script = part("echo", b'{"fail": "hang"}')
        body = MODEL + script + part("file", bytes(MIB), "a.wav") + END
        async with wire(cluster.url) as connection:
            await connection.send(upload(body))
            await eventually(lambda: cluster.in_progress("echo"))
            assert await blobs() > before

        async def gone() -> bool:
            return await blobs() <= before and await cluster.stored("echo") == 0

        await eventually(gone)


@pytest.fixture(scope="module")
def curl() -> str:
    found = shutil.which("curl")
    if found is None:
        pytest.skip("curl is not on PATH")
    return found


class TestOddClients:
    """Honest ones."""

    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("-H", "Expect: 100-continue"),
            ("-H", "Transfer-Encoding: chunked"),
            ("-H", "Transfer-Encoding: chunked", "-H", "Expect:"),
            ("--http1.0",),
            ("--http2",),
        ],
        ids=" ".join,
    )
    @pytest.mark.parametrize("file", ["@{}", "@{};type=audio/wav", '@"{}";filename=日本.wav', "<{}"])
    async def test_uploads_by_curl(
        self, cluster: Cluster, curl: str, tmp_path: Path, options: tuple[str, ...], file: str
    ) -> None:
        """However curl is told to send a file, it arrives whole."""
        path = tmp_path / "a b.wav"
        path.write_bytes(SOUND)
        command = [curl, "-sS", "--fail-with-body", cluster.url + TRANSCRIPTIONS, "-H", f"Authorization: Bearer {KEY}"]
        command += ["-F", "model=echo", "-F", "file=" + file.format(path), *options]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, (out, err)
        assert HEARD in json.loads(out)["text"]

    async def test_a_large_upload_by_curl_with_a_wrong_key(self, cluster: Cluster, curl: str, tmp_path: Path) -> None:
        """curl gets the 401, whether it asks before it sends (which it does where the file is large) or not."""
        path = tmp_path / "large.wav"
        path.write_bytes(bytes(25 * MIB))
        for expect in ("Expect: 100-continue", "Expect:"):
            process = await asyncio.create_subprocess_exec(
                *(curl, "-sS", "-w", "\n%{http_code}", cluster.url + TRANSCRIPTIONS, "-H", "Authorization: Bearer no"),
                *("-F", "model=echo", "-F", f"file=@{path}", "-H", expect),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, _ = await process.communicate()
            body, _, status = out.decode().rpartition("\n")
            assert (status, json.loads(body)["error"]["code"]) == ("401", "invalid_api_key")

    async def test_the_requests_library(self, cluster: Cluster) -> None:
        """Files and fields as `requests` encodes them, and JSON."""
        requests = pytest.importorskip("requests")
        key = {"authorization": f"Bearer {KEY}"}

        def ask() -> tuple[Any, Any]:
            files = {"file": ("häns.wav", SOUND, "audio/wav")}
            sent = requests.post(cluster.url + TRANSCRIPTIONS, headers=key, data={"model": "echo"}, files=files)
            plain = requests.post(cluster.url + EMBEDDINGS, headers=key, json=GOOD[EMBEDDINGS])
            return sent.json(), plain.json()

        sent, plain = await asyncio.to_thread(ask)
        assert HEARD in sent["text"]
        assert isinstance(plain["data"][0]["embedding"][0], float)

    async def test_a_form_in_chunks_byte_by_byte(self, cluster: Cluster) -> None:
        """Boundaries may be cut anywhere."""
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in FORM) + b"0\r\n\r\n"
        request = head("transfer-encoding: chunked", FORM_TYPE, path=TRANSCRIPTIONS) + chunks
        assert HEARD in (await exchange(cluster.url, request)).json["text"]

    async def test_sound_over_http_1_0(self, cluster: Cluster) -> None:
        """Without chunks, sound ends with its connection."""
        body = json.dumps(GOOD[SPEECH]).encode()
        async with wire(cluster.url) as connection:
            await connection.send(head(f"content-length: {len(body)}", path=SPEECH, version="1.0") + body)
            answer = await connection.answer()
        assert (answer.status, answer.headers["content-type"]) == (200, "audio/wav")
        assert "transfer-encoding" not in answer.headers
        assert answer.body.startswith(b"RIFF")

    async def test_what_open_webui_asks(self, cluster: Cluster) -> None:
        """Its lists of voices and of speech models are filled."""
        voices = (await cluster.get("/v1/audio/voices")).json()["voices"]
        models = (await cluster.get("/v1/audio/models")).json()["models"]
        assert {"id": "echo", "name": "echo"} in voices
        assert "echo" in [model["id"] for model in models]

    async def test_a_preamble_and_an_epilogue(self, cluster: Cluster) -> None:
        """Line ends before a form's first boundary, and text after its last, are passed over."""
        for body in (b"\r\n" + FORM, FORM + b"epilogue\r\n"):
            assert HEARD in (await exchange(cluster.url, upload(body))).json["text"]
