"""The service adapter: anybody's HTTP services, as the registry names them."""

from __future__ import annotations

import asyncio
import base64
import json
import wave
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from io import BytesIO
from typing import Any

import pytest

from schemas.errors import NexusError
from schemas.frames import Progress
from schemas.jobs import Capability
from schemas.parameters.audio import SAMPLE_SOUND
from schemas.presence import ServiceRecord
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually
from tests.backends.contract import Contract, Rig, body_of, chat, check_stream, collect, events, task
from tests.backends.described import check_description
from tests.backends.doubles.service import CHAT, ServiceDouble, embedding, form_of, picture, whole_chat
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Task,
    UploadedFile,
)
from workers.backends.service.adapter import ServiceBackend
from workers.backends.service.metadata import ENDPOINTS, endpoints_in, parse_metadata

PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 3000
SPEECH, EMBEDDINGS, IMAGES = "/v1/audio/speech", "/v1/embeddings", "/v1/images/generations"
TRANSCRIPTIONS = "/v1/audio/transcriptions"


def record(double: ServiceDouble, **more: Any) -> ServiceRecord:
    return ServiceRecord(name=double.name, base_url=double.url, **more)


class Services:
    """An adapter, and doubles of services that it is told of."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.backend = ServiceBackend(BackendConfig())
        self.records: dict[str, ServiceRecord] = {}
        self.changes = 0
        self.backend.notify_changed = self._changed

    def _changed(self) -> None:
        self.changes += 1

    async def double(self, name: str = "talker", *paths: str) -> ServiceDouble:
        return await self._stack.enter_async_context(ServiceDouble(name, *paths))

    async def add(self, name: str = "talker", *paths: str, **more: Any) -> ServiceDouble:
        double = await self.double(name, *paths)
        self.enter(record(double, **more))
        return double

    def enter(self, one: ServiceRecord) -> None:
        self.records[one.name] = one
        self.backend.services_changed(dict(self.records))

    def remove(self, name: str) -> None:
        del self.records[name]
        self.backend.services_changed(dict(self.records))

    async def models(self) -> dict[str, tuple[Capability, ...]]:
        return {model.name: model.capabilities for model in (await self.backend.discover()).models}


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    async with AsyncExitStack() as stack:
        made = Services(stack)
        stack.push_async_callback(made.backend.close)
        yield made


def a_task(
    endpoint: str, model: str, *, files: tuple[UploadedFile, ...] = (), stream: bool = False, **fields: Any
) -> Task:
    body = json.dumps({"model": model, **fields}).encode()
    return Task("job_1", "req_1", ENDPOINTS[endpoint], endpoint, model, "public", stream, body, files)


async def said(services: Services, model: str, **fields: Any) -> str:
    body, _ = await body_of(services.backend, chat(model, **fields))
    return str(body["choices"][0]["message"]["content"])


# The contracts


async def one_service(services: Services) -> ServiceDouble:
    double = await services.add()
    double.documents["/v1/metadata"]["models"] = ["double"]
    return double


class TestText(Contract):
    """Text through a service, as every text adapter does it."""

    @pytest.fixture
    async def rig(self, services: Services, request: pytest.FixtureRequest) -> Rig:
        double = await one_service(services)
        if "stops_the_server" in request.node.name:
            double.behave(words=("word ",) * 2000, token_delay_s=0.02)

        async def idle() -> bool:
            return double.streaming == 0

        return Rig(services.backend, "double", idle, {"max_tokens": 2000})


class TestService(AdapterContract):
    """What every adapter does."""

    @pytest.fixture
    async def rig(self, services: Services) -> AdapterRig:
        double = await one_service(services)
        await services.backend.discover()

        def check(chunks: list[Chunk], finish: Finish) -> None:
            answer = json.loads(b"".join(chunk.data for chunk in chunks))
            assert answer["choices"][0]["message"]["content"] == "Hello there, world!"
            assert finish.usage is not None

        async def idle() -> bool:
            return double.streaming == 0

        bad = task(CHAT, "double", False, {"model": "double", "messages": "none"})
        return AdapterRig(
            services.backend,
            Capability.CHAT,
            chat("double"),
            check,
            chat("double", user="slow"),
            bad,
            idle,
            double.kill,
            double.start,
        )


# What a service says of itself


async def test_without_a_service_there_is_nothing_to_serve_and_nothing_wrong(services: Services) -> None:
    """A worker that waits for its first service is well."""
    await services.backend.health()
    found = await services.backend.discover()
    assert (found.models, found.slots, found.problems) == ((), None, ())
    with pytest.raises(ModelNotServed):
        await collect(services.backend, chat("any"))


async def test_a_service_that_names_no_model_is_called_by_its_own_name(services: Services) -> None:
    await services.add("talker")
    found = await services.backend.discover()
    assert [(one.name, one.capabilities, one.owned_by) for one in found.models] == [
        ("talker", (Capability.CHAT, Capability.COMPLETIONS), "talker")
    ]
    assert await said(services, "talker") == "Hello there, world!"


async def test_models_come_from_metadata_else_from_the_list_of_models_else_from_the_form(services: Services) -> None:
    """In this order; the first that names any counts."""
    double = await services.add()
    metadata = double.documents["/v1/metadata"]
    metadata["ui"] = {"options": [{"key": "model", "type": "enum", "values": ["m1", "m2"]}]}
    assert set(await services.models()) == {"m1", "m2"}
    metadata["models"] = [{"id": "m3", "context_length": 4096}]
    assert set(await services.models()) == {"m3"}
    assert (await services.backend.discover()).models[0].context_length == 4096
    del metadata["models"], metadata["ui"]
    double.documents["/v1/models"] = {"object": "list", "data": [{"id": "m4", "object": "model"}]}
    assert set(await services.models()) == {"m4"}


async def test_what_metadata_lacks_the_descriptor_says(services: Services) -> None:
    double = await services.add()
    double.documents = {"/v1/descriptor": double.metadata(SPEECH, models=["voice"], voices=["amy", "joe"])}
    found = await services.backend.discover()
    assert [(one.name, one.capabilities, one.voices) for one in found.models] == [
        ("voice", (Capability.SPEECH,), ("amy", "joe"))
    ]


async def test_a_form_says_what_the_models_can_be_told(services: Services) -> None:
    """Its fields narrow the endpoint's usual parameters, and add others."""
    double = await services.add("talker", SPEECH)
    options = [
        {"key": "model", "type": "enum", "values": ["voice"]},
        {"key": "mood", "label": "Mood", "type": "enum", "values": [{"value": "calm"}, "glad"], "required": True},
        {"key": "speed", "type": "slider", "min": 0.5, "max": 2, "step": 0.1, "default": 1.0},
        {"key": "<script>", "type": "text"},
        {"key": "loud", "type": "boolean", "default": False},
        "nonsense",
    ]
    double.documents["/v1/descriptor"] = {"ui": {"options": options}}
    double.answers = {SPEECH: base64.b64decode(SAMPLE_SOUND)}
    described = await check_description(services.backend, "voice")
    properties = described.endpoints[SPEECH].parameters["properties"]
    assert properties["mood"] == {"type": "string", "title": "Mood", "enum": ["calm", "glad"]}
    assert (properties["speed"]["minimum"], properties["speed"]["maximum"]) == (0.5, 2)
    assert properties["loud"]["type"] == "boolean"
    assert {"model", "<script>"}.isdisjoint(properties)
    assert described.endpoints[SPEECH].parameters["required"] == ["input", "mood"]


async def test_a_service_may_give_the_schema_itself(services: Services) -> None:
    """An invalid one is not used, and the operator reads why."""
    double = await services.add("talker", EMBEDDINGS)
    schema = {"type": "object", "properties": {"input": {"type": "string", "title": "Text"}}, "required": ["input"]}
    entry = {"path": "/embeddings", "parameters": schema, "example": {"input": "Hello."}}
    double.documents["/v1/descriptor"] = {"endpoints": [entry]}
    double.answers = {EMBEDDINGS: embedding([1.0, 0.0])}
    described = await check_description(services.backend, "talker")
    assert described.endpoints[EMBEDDINGS].parameters == schema
    entry["parameters"] = {"$ref": "https://elsewhere.example"}
    [problem] = (await services.backend.discover()).problems
    assert "talker" in problem
    assert "$ref" in problem
    double.answers = {EMBEDDINGS: embedding([1.0, 0.0], [0.0, 1.0])}
    described = await check_description(services.backend, "talker")
    assert "dimensions" in described.endpoints[EMBEDDINGS].parameters["properties"]


async def test_metadata_may_lie_elsewhere(services: Services) -> None:
    """`metadata_url` may be another server's; one that leads nowhere is not believed."""
    elsewhere = await services.double("elsewhere", EMBEDDINGS)
    elsewhere.documents["/about/it"] = elsewhere.documents.pop("/v1/metadata")
    double = await services.add("talker", metadata_url=f"{elsewhere.url}/about/it")
    assert await services.models() == {"talker": (Capability.EMBEDDINGS,)}
    services.enter(record(double, metadata_url=f"{double.url}/v1/v1/metadata"))
    assert await services.models() == {"talker": (Capability.CHAT, Capability.COMPLETIONS)}


async def test_a_server_without_metadata_is_taken_by_its_openapi_document_and_its_models(services: Services) -> None:
    """As services that never heard of Nexus are; base URLs may end in `/v1`."""
    double = await services.add()
    services.enter(ServiceRecord(name="talker", base_url=f"{double.url}/v1"))
    double.documents = {
        "/openapi.json": {"paths": {IMAGES: {"post": {}}, "/v1/models": {"get": {}}}},
        "/v1/models": {"data": [{"id": "stabilityai/sdxl-turbo"}]},
    }
    assert await services.models() == {"stabilityai/sdxl-turbo": (Capability.IMAGES,)}
    double.documents = {"/v1/models": {"data": [{"id": "llama3.1:8b"}, {"id": "nomic-embed-text"}]}}
    assert await services.models() == {
        "llama3.1:8b": (Capability.CHAT, Capability.COMPLETIONS),
        "nomic-embed-text": (Capability.EMBEDDINGS,),
    }
    assert await said(services, "llama3.1:8b") == "Hello there, world!"
    assert double.last.path == CHAT


async def test_endpoints_that_nexus_does_not_know_offer_nothing(services: Services) -> None:
    """And what is wrong is said, with what to do."""
    double = await services.add("ocr")
    double.documents = {"/v1/metadata": double.metadata("/v1/ocr"), "/v1/models": {"data": [{"id": "lighton"}]}}
    with pytest.raises(BackendUnavailable, match=r"ocr: .*/v1/metadata names no endpoint"):
        await services.backend.discover()
    with pytest.raises(BackendUnavailable):
        await collect(services.backend, chat("lighton"))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"endpoints": [{"path": CHAT, "method": "POST"}, {"path": "/v1/models", "method": "GET"}]}, {CHAT}),
        ({"name": "tts", "endpoints": {"health": "/health", "audio_speech": SPEECH}}, {SPEECH}),
        ({"endpoints": [EMBEDDINGS, 7, None, {"path": None}, "//["]}, {EMBEDDINGS}),
        (
            {"endpoints": ["http://host:9000/v1/rerank", "/audio/translations/"]},
            {"/v1/rerank", "/v1/audio/translations"},
        ),
        ({"endpoints": [{"path": CHAT, "method": "GET"}]}, set()),
        ({"capabilities": {"domains": ["chat", "embedding", "video"]}}, {CHAT, EMBEDDINGS}),
        ({"capabilities": ["TTS"], "endpoints": "none"}, {SPEECH}),
        ({}, set()),
    ],
)
def test_endpoints_are_read_however_they_are_written(document: dict[str, Any], expected: set[str]) -> None:
    assert endpoints_in(document) == expected


def test_a_model_serves_what_it_says_or_is_known_for_else_all() -> None:
    models = ["my-own", "nomic-embed-text", {"id": "mixed", "capabilities": ["chat"]}, {"name": "named"}, {}, 7]
    advert = parse_metadata("s", frozenset({CHAT, EMBEDDINGS}), [{"models": models}], None)
    both = (Capability.CHAT, Capability.EMBEDDINGS)
    assert {one.name: one.capabilities for one in advert.models} == {
        "my-own": both, "nomic-embed-text": (Capability.EMBEDDINGS,), "mixed": (Capability.CHAT,), "named": both
    }  # fmt: skip


# What it answers


async def test_a_service_that_does_not_stream_is_streamed_all_the_same(services: Services) -> None:
    """Whether it says so beforehand, ignores the wish, or refuses it."""
    double = await services.add()
    double.answers[CHAT] = whole_chat("in one piece")
    for _ in range(2):
        chunks, finish = await collect(services.backend, chat("talker", stream=True))
        assert check_stream(events(chunks), "talker", is_chat=True) == "in one piece"
        assert finish.usage is not None
        assert finish.usage.completion_tokens == 2
        assert await said(services, "talker") == "in one piece"
        assert double.last.json["stream"] is (_ == 0)
        double.documents["/v1/metadata"]["capabilities"] = {"streaming": False}
        await services.backend.discover()


async def test_a_service_that_refuses_our_fields_is_asked_without_them(services: Services) -> None:
    double = await services.add()
    double.behave(no_stream_options=True)
    assert await said(services, "talker") == "Hello there, world!"
    assert await said(services, "talker") == "Hello there, world!"
    asked = [seen for seen in double.seen if seen.method == "POST" and b'"Hi"' not in seen.body]  # not by a probe
    assert len(asked) == 3
    assert [known.feature for known in services.backend.limitations()] == ["stream_options"]


async def test_every_kind_of_answer_passes(services: Services) -> None:
    """Vectors, pictures, sound and transcripts, each in its own form."""
    sound = BytesIO()
    with wave.open(sound, "wb") as out:
        out.setparams((1, 2, 24000, 0, "NONE", ""))
        out.writeframes(b"\1\2" * 2400)
    double = await services.add("all", EMBEDDINGS, IMAGES, SPEECH, TRANSCRIPTIONS)
    double.answers = {
        EMBEDDINGS: embedding([0.5, 1.0]),
        IMAGES: picture(PNG),
        SPEECH: sound.getvalue(),
        TRANSCRIPTIONS: {"text": "hello world"},
    }
    body, _ = await body_of(services.backend, a_task(EMBEDDINGS, "all", input="x"))
    assert (body["model"], body["data"][0]["embedding"]) == ("public", [0.5, 1.0])
    body, _ = await body_of(services.backend, a_task(IMAGES, "all", prompt="a cat"))
    assert body["data"] == picture(PNG)["data"]
    chunks, finish = await collect(
        services.backend, a_task(SPEECH, "all", input="hi", response_format="wav", stream=True)
    )
    assert finish.content_type == "audio/wav"
    assert b"\1\2" * 2400 in b"".join(chunk.data for chunk in chunks)

    async def pieces() -> AsyncIterator[bytes]:
        yield sound.getvalue()[:100]
        yield sound.getvalue()[100:]

    file = UploadedFile("file", "a.wav", "audio/wav", len(sound.getvalue()), pieces)
    work = a_task(TRANSCRIPTIONS, "all", files=(file,), language="en")
    body, _ = await body_of(services.backend, work)
    assert body["text"] == "hello world"
    form = form_of(double.seen[-1])
    assert (form["file"], form["language"], form["model"]) == (sound.getvalue(), b"en", b"all")


async def test_an_endpoint_that_the_service_lacks_is_refused_by_name(services: Services) -> None:
    """Nothing is sent to it."""
    double = await services.add("all", IMAGES)
    with pytest.raises(
        BackendRefused, match=r"the service all does not serve /v1/images/edits; it serves /v1/images/gen"
    ):
        await collect(services.backend, a_task("/v1/images/edits", "all", prompt="x"))
    assert not double.posted


async def test_redirects_are_not_followed(services: Services) -> None:
    """Neither for what it says nor for what it answers."""
    double = await services.add()
    double.documents["/v1/metadata"] = 302
    with pytest.raises(BackendUnavailable, match="redirects to /elsewhere"):
        await services.backend.discover()
    assert "/elsewhere" not in [seen.path for seen in double.seen]


# Several


async def test_one_bad_service_never_hides_the_others(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead, hanging, broken, not ready or wrongly entered: the others are served, and each problem is named."""
    monkeypatch.setattr("workers.backends.service.instance.POLL_TIMEOUT_S", 0.3)
    await services.add("good")
    (await services.add("hangs")).silent = True
    (await services.add("broken")).documents["/v1/metadata"] = 500
    (await services.add("loading")).ready = 503
    services.enter(ServiceRecord(name="absent", base_url="http://127.0.0.1:1"))
    services.enter(ServiceRecord(name="wrong", base_url="localhost:9000"))
    found = await services.backend.discover()
    assert [one.name for one in found.models] == ["good"]
    assert [one.partition(":")[0] for one in found.problems] == ["absent", "broken", "hangs", "loading", "wrong"]
    await services.backend.health()


async def test_of_two_with_one_model_the_first_by_name_is_asked_and_the_other_stands_in(services: Services) -> None:
    """Also when the first one dies, is full or breaks off before anything has come."""
    first, second = await services.add("a"), await services.add("b")
    for double in (first, second):
        double.documents["/v1/metadata"]["models"] = ["m"]
    assert list(await services.models()) == ["m"]
    assert await said(services, "m") == "Hello there, world!"
    assert (len(first.posted), len(second.posted)) == (1, 0)
    first.behave(status=503, error={"error": {"message": "full"}})
    assert await said(services, "m") == "Hello there, world!"
    first.behave(drop="before")
    assert await said(services, "m") == "Hello there, world!"
    await first.kill()
    assert await said(services, "m") == "Hello there, world!"
    assert len(second.posted) == 3
    assert services.changes == 3


async def test_a_caller_error_is_not_taken_to_the_other_one(services: Services) -> None:
    first, second = await services.add("a"), await services.add("b")
    for double in (first, second):
        double.documents["/v1/metadata"]["models"] = ["m"]
    first.behave(status=400, error={"error": {"message": "bad", "type": "invalid_request_error"}})
    with pytest.raises(BackendRefused, match="bad"):
        await said(services, "m")
    assert not second.posted


async def test_what_the_caller_has_seen_is_never_begun_anew_elsewhere(services: Services) -> None:
    first, second = await services.add("a"), await services.add("b")
    for double in (first, second):
        double.documents["/v1/metadata"]["models"] = ["m"]
    first.behave(drop="mid")
    with pytest.raises(BackendError) as caught:
        await collect(services.backend, chat("m", stream=True))
    assert caught.value.transient
    assert not second.posted


# Slots


async def test_slots_are_each_service_s_own_and_the_worker_has_their_sum(services: Services) -> None:
    """By its metadata, by the operator's record, else the default."""
    one = await services.add("a")
    one.documents["/v1/metadata"]["capabilities"] = {"max_concurrency": 3}
    await services.add("b", concurrency=2)
    assert (await services.backend.discover()).slots == 5
    await services.add("c")
    assert (await services.backend.discover()).slots == 5 + ServiceBackend.default_slots


async def test_no_service_gets_more_at_once_than_it_takes(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who wait say so, and come in their order."""
    monkeypatch.setattr("workers.backends.service.adapter.QUEUED_INTERVAL_S", 0.02)
    double = await services.add(concurrency=1)
    double.behave(words=("w",) * 4, token_delay_s=0.02)
    most, queued, order = 0, 0, []
    await services.backend.discover()

    async def one(number: int) -> None:
        nonlocal most, queued
        async for output in services.backend.run(chat("talker", stream=True)):
            most = max(most, double.streaming)
            queued += isinstance(output, Progress) and output.phase == "queued"
        order.append(number)

    await asyncio.gather(*(one(number) for number in range(4)))
    assert (most, order) == (1, [0, 1, 2, 3])
    assert queued > 0


async def test_a_request_that_waits_for_a_slot_can_be_cancelled(services: Services) -> None:
    """It takes no slot with it."""
    double = await services.add(concurrency=1)
    running = asyncio.create_task(collect(services.backend, chat("talker", user="slow")))

    async def streaming() -> bool:
        return double.streaming == 1

    await eventually(streaming, 5)
    waiting = asyncio.create_task(collect(services.backend, chat("talker")))
    await asyncio.sleep(0)
    for work in (waiting, running):
        work.cancel()
    await asyncio.gather(waiting, running, return_exceptions=True)
    assert await said(services, "talker") == "Hello there, world!"


# Moving


async def test_a_service_moves_and_requests_under_way_end_where_they_began(services: Services) -> None:
    """Nothing is broken off, and nothing new goes to the old place."""
    old = await services.add()
    old.behave(words=("old",) * 5, token_delay_s=0.02)
    running = asyncio.create_task(said(services, "talker"))

    async def streaming() -> bool:
        return old.streaming == 1

    await eventually(streaming, 5)
    new = await services.add()
    new.behave(words=("new",))
    assert await said(services, "talker") == "new"
    assert await running == "old" * 5
    assert len(old.posted) == 1
    await services.backend.discover()
    assert old.posted == [CHAT]


async def test_a_removed_service_is_gone_at_once(services: Services) -> None:
    await services.add("a")
    await services.add("b")
    await services.models()
    services.remove("a")
    assert list(await services.models()) == ["b"]
    with pytest.raises(ModelNotServed):
        await said(services, "a")


async def test_a_service_that_goes_away_is_withdrawn_and_comes_back(services: Services) -> None:
    """A look at the health finds out, and asks for a discovery."""
    await services.add("a")
    double = await services.add("b")
    assert list(await services.models()) == ["a", "b"]
    double.ready = 503
    await services.backend.health()
    assert services.changes == 1
    assert list(await services.models()) == ["a"]
    with pytest.raises(BackendUnavailable, match="the service b is not ready: /readyz answers 503"):
        await said(services, "b")
    double.ready = 200
    await services.backend.health()
    assert services.changes == 2
    assert list(await services.models()) == ["a", "b"]


async def test_a_ready_service_may_be_slow_to_say_so(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full load; three times in a row is too much."""
    monkeypatch.setattr("workers.backends.service.instance.POLL_TIMEOUT_S", 0.05)
    double = await services.add()
    await services.models()
    double.silent = True
    await services.backend.health()
    await services.backend.health()
    with pytest.raises(BackendUnavailable, match="no answer within"):
        await services.backend.health()


# Settings


def test_settings_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="no option speed"):
        ServiceBackend(BackendConfig(options={"speed": "1"}))
    with pytest.raises(ValueError, match="nexus services add"):
        ServiceBackend(BackendConfig(url="http://127.0.0.1:9000"))


async def test_a_worker_may_serve_only_some_models(services: Services) -> None:
    double = await services.double()
    double.documents["/v1/metadata"]["models"] = ["m1", "m2"]
    backend = ServiceBackend(BackendConfig(models=("m2",), api_key="secret"))
    backend.services_changed({"talker": record(double)})
    assert [one.name for one in (await backend.discover()).models] == ["m2"]
    with pytest.raises(NexusError):
        await collect(backend, chat("m1"))
    await collect(backend, chat("m2"))
    assert double.last.headers["authorization"] == "Bearer secret"
    await backend.close()


async def test_a_service_that_asks_to_wait_is_left_alone_for_that_model(services: Services) -> None:
    """Another service that has the model is asked meanwhile; without one, the error says how long to wait."""
    busy, well = await services.add("a-busy"), await services.add("b-well")
    for double in (busy, well):
        double.documents["/v1/metadata"]["models"] = ["m"]
    await services.backend.discover()
    busy.behave(status=503, error={"error": {"message": "busy"}}, headers={"retry-after": "30"})
    for _ in range(3):
        assert await said(services, "m") == "Hello there, world!"
    assert (len(busy.posted), len(well.posted)) == (1, 3)
    well.behave(status=503, error={"error": {"message": "Loading model"}})
    for _ in range(2):
        with pytest.raises(BackendUnavailable) as caught:
            await said(services, "m")
        assert caught.value.pause_s is not None
        assert 1 < caught.value.pause_s <= 2
    assert (len(busy.posted), len(well.posted)) == (1, 4)
