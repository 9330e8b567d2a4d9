"""The official OpenAI SDK for Python on everything that is no text: changed only in `base_url`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from tests.cluster import KEY, Cluster

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # the SDK's word on translations
]

PNG = b"\x89PNG\r\n\x1a\n"
SOUND = b"RIFF" + bytes(range(200))
SPOKEN: Any = {"model": "echo", "voice": "alloy"}

# format -> its content type, and how its sound begins
SOUNDS = {
    "mp3": ("audio/mpeg", (b"ID3", b"\xff\xfb", b"\xff\xf3")),
    "opus": ("audio/ogg", (b"OggS",)),
    "aac": ("audio/aac", (b"\xff\xf1", b"\xff\xf9")),
    "flac": ("audio/flac", (b"fLaC",)),
    "wav": ("audio/wav", (b"RIFF",)),
    "pcm": ("audio/pcm", (b"",)),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def sync_client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def heard(data: bytes) -> str:
    """What echo understands of a sound."""
    return f"Echo heard {len(data)} bytes with the SHA-256 {hashlib.sha256(data).hexdigest()}."


def is_png(b64: str | None) -> bool:
    return base64.b64decode(b64 or "").startswith(PNG)


class TestEmbeddings:
    async def test_the_default_is_packed_on_the_way_and_numbers_here(self, client: AsyncOpenAI) -> None:
        """The SDK asks for base64 and unpacks it: the same numbers as without."""
        packed = await client.embeddings.create(model="echo", input="to be")
        plain = await client.embeddings.create(model="echo", input="to be", encoding_format="float")
        assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding)
        assert (packed.object, packed.model, packed.data[0].index) == ("list", "echo", 0)
        assert packed.usage.total_tokens == packed.usage.prompt_tokens == 2

    async def test_a_batch_keeps_its_order(self, client: AsyncOpenAI) -> None:
        """The vectors of a batch stand in the order of its texts."""
        texts = [f"text {number}" for number in range(100)]
        batch = await client.embeddings.create(model="echo", input=texts)
        assert [item.index for item in batch.data] == list(range(100))
        alone = await client.embeddings.create(model="echo", input=texts[57])
        assert batch.data[57].embedding == alone.data[0].embedding

    @pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2, 3], [4]]], ids=["one", "several"])
    async def test_token_ids(self, client: AsyncOpenAI, tokens: Any) -> None:
        """LangChain sends token ids instead of text."""
        count = len(tokens) if isinstance(tokens[0], list) else 1
        assert len((await client.embeddings.create(model="echo", input=tokens)).data) == count

    async def test_dimensions(self, client: AsyncOpenAI) -> None:
        """`dimensions` is the length of what comes."""
        answer = await client.embeddings.create(model="echo", input=["a", "b"], dimensions=17)
        assert [len(item.embedding) for item in answer.data] == [17, 17]

    async def test_the_synchronous_client(self, sync_client: OpenAI) -> None:
        """The synchronous client gets the same."""
        assert len(sync_client.embeddings.create(model="echo", input="a").data[0].embedding) == 64


class TestImages:
    async def test_as_data(self, client: AsyncOpenAI) -> None:
        """As many pictures as were asked for, in the size that was asked for."""
        answer = await client.images.generate(model="echo", prompt="a cat", n=2, size="256x256")
        assert len(answer.data or ()) == 2
        assert all(is_png(item.b64_json) and item.url is None for item in answer.data or ())
        data = base64.b64decode((answer.data or [])[0].b64_json or "")
        assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [256, 256]

    async def test_by_url(self, client: AsyncOpenAI) -> None:
        """A URL is fetched with no key, also by who asks only for its head."""
        answer = await client.images.generate(model="echo", prompt="a cat", response_format="url")
        item = (answer.data or [])[0]
        assert item.b64_json is None
        async with httpx.AsyncClient() as stranger:
            shown = await stranger.get(item.url or "")
            asked = await stranger.head(item.url or "")
        assert (shown.status_code, shown.headers["content-type"]) == (200, "image/png")
        assert shown.content.startswith(PNG)
        assert (asked.status_code, asked.headers["content-length"]) == (200, str(len(shown.content)))

    async def test_the_model_may_be_left_out(self, client: AsyncOpenAI, cluster: Cluster) -> None:
        """OpenAI's own default is a model that nobody else has: the alias `default-images` takes its place."""
        with pytest.raises(openai.BadRequestError) as caught:  # several models paint here
            await client.images.generate(prompt="a cat")
        assert caught.value.param == "model"
        assert "echo" in caught.value.message
        alias = cluster.url + "/v1/aliases/default-images"
        assert (await cluster.http.put(alias, json={"targets": ["echo"]})).status_code == 200
        try:
            async with asyncio.timeout(10):
                while (await cluster.get("/v1/models/default-images")).status_code != 200:
                    await asyncio.sleep(0.02)
            answer = await client.images.generate(prompt="a cat")
            edited = await client.images.edit(prompt="a cat", image=PNG)
        finally:
            await cluster.http.delete(alias)
        assert is_png((answer.data or [])[0].b64_json)
        assert is_png((edited.data or [])[0].b64_json)

    async def test_a_stream(self, client: AsyncOpenAI) -> None:
        """Partial pictures come before the complete one, numbered."""
        stream = await client.images.generate(model="echo", prompt="a cat", stream=True, partial_images=2)
        *partial, last = [event async for event in stream]
        assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
        assert [getattr(event, "partial_image_index", None) for event in partial] == [0, 1]
        assert last.type == "image_generation.completed"
        assert all(is_png(event.b64_json) for event in (*partial, last))

    async def test_a_stream_that_breaks(self, client: AsyncOpenAI) -> None:
        """A stream that fails after it began raises."""
        script: Any = {"echo": {"fail": "mid", "delay_ms": 20}}
        stream = await client.images.generate(
            model="echo", prompt="a cat", stream=True, partial_images=3, extra_body=script
        )
        with pytest.raises(openai.APIError):
            _ = [event async for event in stream]

    async def test_edits(self, client: AsyncOpenAI) -> None:
        """Several pictures and a mask go up; numbers in the form are numbers."""
        images: Any = [("a.png", PNG + b"a"), ("b.png", PNG + b"b", "image/png")]
        mask: Any = io.BytesIO(PNG)
        answer = await client.images.edit(model="echo", prompt="a hat", image=images, mask=mask, n=2, size="64x64")
        assert [is_png(item.b64_json) for item in answer.data or ()] == [True, True]

    async def test_edits_streamed(self, client: AsyncOpenAI) -> None:
        """Edits stream as generations do, with names of their own."""
        stream = await client.images.edit(
            model="echo", prompt="a hat", image=("a.png", PNG), stream=True, partial_images=1
        )
        assert [event.type async for event in stream] == ["image_edit.partial_image", "image_edit.completed"]

    async def test_the_synchronous_client(self, sync_client: OpenAI, tmp_path: Path) -> None:
        """The synchronous client gets the same, from a file on disk."""
        path = tmp_path / "a.png"
        path.write_bytes(PNG)
        assert is_png((sync_client.images.edit(model="echo", prompt="x", image=path).data or [])[0].b64_json)
        kinds = [event.type for event in sync_client.images.generate(model="echo", prompt="x", stream=True)]
        assert kinds == ["image_generation.completed"]


class TestSpeech:
    @pytest.mark.parametrize("kind", SOUNDS)
    async def test_every_format(self, client: AsyncOpenAI, kind: Any) -> None:
        """Each format comes as such, under its own content type."""
        answer = await client.audio.speech.create(input="hello you", response_format=kind, **SPOKEN)
        content_type, beginnings = SOUNDS[kind]
        assert answer.response.headers["content-type"] == content_type
        assert answer.content.startswith(beginnings)
        assert len(answer.content) > 100

    async def test_the_default_is_mp3(self, client: AsyncOpenAI) -> None:
        """As with OpenAI."""
        answer = await client.audio.speech.create(input="hello you", **SPOKEN)
        assert answer.response.headers["content-type"] == "audio/mpeg"

    async def test_the_first_sound_comes_before_the_last_is_made(self, client: AsyncOpenAI) -> None:
        """`with_streaming_response` gives pieces while echo still waits for its next word, which never comes."""
        script: Any = {"echo": {"fail": "hang_mid", "tokens": 4}}
        speech = client.audio.speech.with_streaming_response
        async with speech.create(input="word " * 20, response_format="pcm", extra_body=script, **SPOKEN) as answer:
            assert "content-length" not in answer.headers
            async for piece in answer.iter_bytes():
                assert piece
                break

    async def test_to_a_file(self, client: AsyncOpenAI, tmp_path: Path) -> None:
        """`stream_to_file` writes all of it."""
        path = tmp_path / "speech.wav"
        asked: Any = {"input": "hello " * 20, "response_format": "wav", **SPOKEN}
        async with client.audio.speech.with_streaming_response.create(**asked) as answer:
            await answer.stream_to_file(path)
        assert path.read_bytes() == (await client.audio.speech.create(**asked)).content

    async def test_as_events(self, client: AsyncOpenAI) -> None:
        """`stream_format: sse` is a stream of events, whose sound is that of the plain answer."""
        asked: Any = {"input": "hello you", "response_format": "pcm", **SPOKEN}
        plain = (await client.audio.speech.create(**asked)).content
        sound = b""
        kinds: list[str] = []
        async with client.audio.speech.with_streaming_response.create(**asked, stream_format="sse") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            decoder = client._make_sse_decoder()
            async for event in decoder.aiter_bytes(answer.iter_bytes()):
                if event.data != "[DONE]":
                    kinds.append(event.json()["type"])
                    sound += base64.b64decode(event.json().get("audio", ""))
        assert set(kinds[:-1]) == {"speech.audio.delta"}
        assert kinds[-1] == "speech.audio.done"
        assert sound == plain

    async def test_a_caller_who_hangs_up(self, client: AsyncOpenAI, cluster: Cluster, eventually: Any) -> None:
        """The worker's attempt is cancelled soon after a caller has left in the middle."""
        worker = await cluster.start_worker(WORKER_MODELS="slow-speech", WORKER_BACKEND_OPTIONS="delay_ms=100")
        asked: Any = {"model": "slow-speech", "input": "word " * 5000, "voice": "alloy", "response_format": "pcm"}
        async with client.audio.speech.with_streaming_response.create(**asked) as answer:
            async for _ in answer.iter_bytes():
                break
        await eventually(lambda: cluster.attempts(worker))
        assert [attempt["outcome"] for attempt in cluster.attempts(worker)] == ["cancelled"]

    async def test_a_caller_who_stops_waiting(self, client: AsyncOpenAI, cluster: Cluster, eventually: Any) -> None:
        """The SDK's own time limit raises APITimeoutError, and the work ends."""
        script: Any = {"echo": {"delay_ms": 60_000}}
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.5).audio.speech.create(input="x", extra_body=script, **SPOKEN)

        async def idle() -> bool:
            return await cluster.stored("echo") == 0

        await eventually(idle)

    async def test_a_sound_that_breaks_off(self, client: AsyncOpenAI) -> None:
        """A sound that fails half-way raises; it never looks complete."""
        script: Any = {"echo": {"fail": "mid", "delay_ms": 5}}
        asked: Any = {"input": "word " * 20, "response_format": "pcm", "extra_body": script, **SPOKEN}
        with pytest.raises(Exception, match="peer closed connection"):  # of whichever HTTP client the SDK has
            async with client.audio.speech.with_streaming_response.create(**asked) as answer:
                _ = [piece async for piece in answer.iter_bytes()]

    async def test_the_synchronous_client(self, sync_client: OpenAI) -> None:
        """The synchronous client gets the same."""
        asked: Any = {"input": "hello you", "response_format": "wav", **SPOKEN}
        with sync_client.audio.speech.with_streaming_response.create(**asked) as answer:
            assert b"".join(answer.iter_bytes()) == sync_client.audio.speech.create(**asked).content


class TestTranscriptions:
    async def test_files_in_every_form(self, client: AsyncOpenAI, tmp_path: Path) -> None:
        """A path, an open file, bytes, and tuples with a name and a type: all arrive byte for byte."""
        path = tmp_path / "häns → 日本.wav"
        path.write_bytes(SOUND)
        with path.open("rb") as opened:
            forms: list[Any] = [
                path,
                opened,
                SOUND,
                io.BytesIO(SOUND),
                ("a.wav", SOUND),
                ('q"uo\\te.wav', io.BytesIO(SOUND), "audio/wav"),
                ("a.wav", SOUND, "audio/wav", {"x-more": "1"}),
            ]
            for form in forms:
                answer = await client.audio.transcriptions.create(model="echo", file=form)
                assert answer.text == heard(SOUND)

    @pytest.mark.parametrize(("kind", "begins"), [("text", "Echo"), ("srt", "1\n00:00:00,000"), ("vtt", "WEBVTT\n\n")])
    async def test_plain_text(self, client: AsyncOpenAI, kind: Any, begins: str) -> None:
        """`text`, `srt` and `vtt` are text, not JSON."""
        answer: Any = await client.audio.transcriptions.create(model="echo", file=SOUND, response_format=kind)
        assert isinstance(answer, str)
        assert answer.startswith(begins)
        assert "Echo heard" in answer

    async def test_verbose_with_the_times_asked_for(self, client: AsyncOpenAI) -> None:
        """`verbose_json` has segments with all fields; words only where they are asked for."""
        asked: Any = {"model": "echo", "file": SOUND, "response_format": "verbose_json"}
        plain = await client.audio.transcriptions.create(**asked)
        [segment] = plain.segments
        assert (plain.text, plain.language, plain.words) == (heard(SOUND), "english", None)
        assert (segment.id, segment.start, segment.end) == (0, 0.0, float(plain.duration))
        assert None not in (segment.avg_logprob, segment.compression_ratio, segment.no_speech_prob, segment.tokens)
        both = await client.audio.transcriptions.create(**asked, timestamp_granularities=["word", "segment"])
        assert [word.word for word in both.words][:2] == ["Echo", "heard"]
        assert both.segments
        words = await client.audio.transcriptions.create(**asked, timestamp_granularities=["word"])
        assert words.words

    async def test_a_stream(self, client: AsyncOpenAI) -> None:
        """A stream has the text in pieces, and whole at its end."""
        stream = await client.audio.transcriptions.create(model="echo", file=SOUND, stream=True)
        *deltas, done = [event async for event in stream]
        assert {event.type for event in deltas} == {"transcript.text.delta"}
        assert "".join(event.delta for event in deltas if event.type == "transcript.text.delta") == heard(SOUND)
        assert (done.type, getattr(done, "text", "")) == ("transcript.text.done", heard(SOUND))

    async def test_translations(self, client: AsyncOpenAI) -> None:
        """Translations take the same files, and answer in the same formats."""
        answer = await client.audio.translations.create(model="echo", file=("a.wav", SOUND))
        assert answer.text == heard(SOUND)
        verbose = await client.audio.translations.create(model="echo", file=SOUND, response_format="verbose_json")
        assert verbose.segments
        subtitles: Any = await client.audio.translations.create(model="echo", file=SOUND, response_format="srt")
        assert subtitles.startswith("1\n")

    async def test_a_large_file(self, client: AsyncOpenAI) -> None:
        """A file that travels by reference is none the worse for it."""
        large = SOUND * 20_000
        answer = await client.audio.transcriptions.create(model="echo", file=("a.wav", io.BytesIO(large)))
        assert answer.text == heard(large)

    async def test_the_synchronous_client(self, sync_client: OpenAI) -> None:
        """The synchronous client gets the same."""
        assert sync_client.audio.transcriptions.create(model="echo", file=SOUND).text == heard(SOUND)
        stream = sync_client.audio.transcriptions.create(model="echo", file=SOUND, stream=True)
        assert [event.type for event in stream][-1] == "transcript.text.done"


class TestModels:
    async def test_what_they_can_do(self, client: AsyncOpenAI) -> None:
        """A model of the list, and one by its name, says what it can be asked for."""
        listed = {model.id: model async for model in client.models.list()}["echo"]
        alone = await client.models.retrieve("echo")
        for model in (listed, alone):
            extra: Any = model.model_extra
            assert {"chat", "embeddings", "images", "speech", "transcriptions", "rerank"} <= set(extra["capabilities"])
            assert (extra["voices"], extra["embedding_length"]) == (["echo"], 64)

    async def test_an_alias_is_a_model_to_callers(self, client: AsyncOpenAI, cluster: Cluster, eventually: Any) -> None:
        """An alias is listed, says what it stands for, and answers under its own name."""
        alias = cluster.url + "/v1/aliases/team/any:embedder"
        assert (await cluster.http.put(alias, json={"targets": ["away", "echo"]})).status_code == 200

        async def listed() -> bool:
            return "team/any:embedder" in [model.id async for model in client.models.list()]

        await eventually(listed)
        extra: Any = (await client.models.retrieve("team/any:embedder")).model_extra
        assert (extra["alias_for"], extra["resolves_to"]) == (["away", "echo"], "echo")
        answer = await client.embeddings.create(model="team/any:embedder", input="x")
        assert answer.model == "team/any:embedder"
        assert (await cluster.http.delete(alias)).status_code == 200

    async def test_a_worker_that_manages_no_models(self, client: AsyncOpenAI) -> None:
        """Where no server can pull models, asking for it is a NotFoundError that says so."""
        with pytest.raises(openai.NotFoundError, match="manages models") as caught:
            await client.post("/models/pull", cast_to=object, body={"model": "x"})
        assert caught.value.param == "worker"


ASK: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("embeddings.create", {"input": "x"}),
    "images": ("images.generate", {"prompt": "x"}),
    "edits": ("images.edit", {"prompt": "x", "image": PNG}),
    "speech": ("audio.speech.create", {"input": "x", "voice": "alloy"}),
    "transcriptions": ("audio.transcriptions.create", {"file": SOUND}),
    "translations": ("audio.translations.create", {"file": SOUND}),
}


class TestErrors:
    @staticmethod
    async def _ask(client: AsyncOpenAI, what: str, **more: Any) -> Any:
        name, fields = ASK[what]
        method: Any = client
        for part in name.split("."):
            method = getattr(method, part)
        return await method(**{"model": "echo", **fields, **more})

    @pytest.mark.parametrize("what", ASK)
    async def test_they_are_the_sdks_own_classes(self, client: AsyncOpenAI, what: str) -> None:
        """A wrong key, an unknown model and a failing backend raise what they raise with OpenAI."""
        with pytest.raises(openai.NotFoundError) as unknown:
            await self._ask(client, what, model="none")
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.AuthenticationError) as stranger:
            await self._ask(client.with_options(api_key="sk-wrong"), what)
        assert stranger.value.code == "invalid_api_key"
        script: Any = {"echo": '{"fail": "error"}'}
        with pytest.raises(openai.InternalServerError) as failing:
            await self._ask(client, what, extra_body=script)
        assert (failing.value.status_code, failing.value.code) == (502, "backend_error")
        refuse: Any = {"echo": '{"fail": "refuse"}'}
        with pytest.raises(openai.BadRequestError, match="refuses as requested"):
            await self._ask(client, what, extra_body=refuse)
        for error in (unknown, stranger, failing):
            assert str(error.value.request_id).startswith("req_")

    @pytest.mark.parametrize(
        ("what", "wrong", "param"),
        [
            ("embeddings", {"input": []}, "input"),
            ("embeddings", {"dimensions": 0}, "dimensions"),
            ("images", {"size": "huge"}, "size"),
            ("images", {"stream": True, "response_format": "url"}, "response_format"),
            ("edits", {"n": 11}, "n"),
            ("edits", {"image": b""}, "image"),
            ("speech", {"response_format": "ogg"}, "response_format"),
            ("speech", {"speed": 9}, "speed"),
            ("transcriptions", {"file": b""}, "file"),
            ("transcriptions", {"response_format": "verbose_json", "stream": True}, "response_format"),
            ("transcriptions", {"response_format": "diarized_json"}, "response_format"),
            ("translations", {"temperature": 3}, "temperature"),
        ],
    )
    async def test_what_is_wrong_is_named(
        self, client: AsyncOpenAI, what: str, wrong: dict[str, Any], param: str
    ) -> None:
        """A wrong field is a BadRequestError that names it, also in a form and in a stream."""
        with pytest.raises(openai.BadRequestError) as caught:
            await self._ask(client, what, **wrong)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
