"""Every modality from a caller's side: real gateway, real worker, through the queue, by reference where large."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def crew(shared_crew: Crew) -> Crew:
    """One worker for all tests that leave it alive."""
    return shared_crew


@pytest_asyncio.fixture(loop_scope="module")
async def blobs(cluster: Cluster) -> AsyncIterator[Any]:
    """How many messages the store of blobs holds more than before: what was asked for by URL stays a while."""
    client = await nats.connect(cluster.nats.url)

    async def stored() -> int:
        return (await client.jetstream().stream_info("OBJ_nexus-blobs")).state.messages

    before = await stored()

    async def held() -> int:
        return await stored() - before

    yield held
    await client.close()


async def test_embeddings_in_both_forms(cluster: Cluster, crew: Crew) -> None:
    body = {"model": crew.model, "input": ["one", "two"]}
    plain = (await cluster.post("/v1/embeddings", body)).json()
    packed = (await cluster.post("/v1/embeddings", body | {"encoding_format": "base64"})).json()
    assert [item["index"] for item in plain["data"]] == [0, 1]
    for one, other in zip(plain["data"], packed["data"], strict=True):
        raw = base64.b64decode(other["embedding"])
        assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(one["embedding"])
    assert plain["model"] == crew.model


async def test_the_catalog_shows_a_request_that_works(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """From the adapter through the registry to a caller; a job out of its bounds is refused before it waits."""

    async def described() -> bool:
        answer = (await cluster.get(f"/v1/catalog/{crew.model}")).json()
        return "echo" in answer["endpoints"]["/v1/images/generations"]["parameters"]["properties"]

    await eventually(described)
    entry = (await cluster.get(f"/v1/catalog/{crew.model}")).json()
    assert (entry["state"], entry["workers"][0]["backend"]) == ("loaded", "echo")
    for path in ("/v1/images/generations", "/v1/embeddings", "/v1/chat/completions"):
        answer = await cluster.post(path, entry["endpoints"][path]["example"])
        assert answer.status_code == 200, answer.text
    listed = (await cluster.get("/v1/catalog?capability=images")).json()
    row = next(one for one in listed["data"] if one["id"] == crew.model)
    shared = listed["descriptors"][row["descriptor"]]
    assert shared["/v1/images/generations"]["parameters"] == entry["endpoints"]["/v1/images/generations"]["parameters"]
    body = {"model": crew.model, "prompt": "x", "steps": 5000}
    refused = await cluster.post("/v1/jobs", {"endpoint": "/v1/images/generations", "body": body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "body.steps")
    assert "at most 1000" in refused.json()["error"]["message"]
    assert (await cluster.post("/v1/images/generations", body)).json()["error"]["param"] == "steps"


async def test_a_picture_as_data_and_by_url(cluster: Cluster, crew: Crew) -> None:
    """The URL needs no key, cannot be altered, and shows the same picture."""
    body = {"model": crew.model, "prompt": "a cat", "size": "64x64", "n": 2}
    data = (await cluster.post("/v1/images/generations", body)).json()["data"]
    assert all(base64.b64decode(item["b64_json"]).startswith(PNG) for item in data)
    found = (await cluster.post("/v1/images/generations", body | {"response_format": "url"})).json()["data"]
    for item, plain in zip(found, data, strict=True):
        assert item["url"].startswith(f"{cluster.url}/v1/results/")
        shown = await cluster.http.get(item["url"], headers={"authorization": ""})
        assert (shown.status_code, shown.headers["content-type"]) == (200, "image/png")
        assert shown.content == base64.b64decode(plain["b64_json"])
    forged = found[0]["url"].replace("owner=default", "owner=other")
    assert (await cluster.http.get(forged)).status_code == 404
    assert (await cluster.http.get(found[0]["url"].partition("?")[0])).status_code == 404


async def test_a_team_at_its_bound_harms_no_other(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """Results by URL of one team end early, as its own newer ones need their room, and its large bodies are refused; another team's
    results stay, and its large request is answered.
    """
    bearers = []
    for team, limits in (("full", {"max_result_bytes": 1024 * 1024, "max_pending_bytes": 0}), ("other", {})):
        name = f"{team}-{crew.model}"
        assert (await cluster.post("/v1/teams", {"id": name} | limits)).status_code == 201
        key = (await cluster.post("/v1/keys", {"name": name, "owner": name})).json()["key"]
        bearers.append({"authorization": f"Bearer {key}"})
    full, other = bearers

    async def picture(headers: dict[str, str], prompt: str) -> str:
        body = {"model": crew.model, "prompt": prompt, "response_format": "url", "echo": {"size": 400_000}}
        answer = await cluster.http.post(cluster.url + "/v1/images/generations", json=body, headers=headers)
        return str(answer.json()["data"][0]["url"])

    theirs = await picture(other, "theirs")
    ours = [await picture(full, str(number)) for number in range(4)]

    async def statuses() -> list[int]:
        return [(await cluster.http.get(url)).status_code for url in (theirs, *ours)]

    async def has_made_room() -> bool:
        return await statuses() == [200, 404, 404, 200, 200]

    await eventually(has_made_room)
    large = chat("x" * 1_500_000, model=crew.model)
    refused, answered = [
        await cluster.http.post(cluster.url + "/v1/chat/completions", json=large, headers=headers)
        for headers in (full, other)
    ]
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "storage_limit_reached")
    assert answered.status_code == 200, answered.text


async def test_a_large_picture_goes_by_reference_and_leaves_nothing(
    cluster: Cluster, crew: Crew, blobs: Any, eventually: Eventually
) -> None:
    size = 4 * 1024 * 1024
    body = {"model": crew.model, "prompt": "noise", "echo": {"size": size}}
    answer = await cluster.post("/v1/images/generations", body)
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert len(base64.b64decode(answer.json()["data"][0]["b64_json"])) == size

    async def empty() -> bool:
        return await blobs() == 0

    await eventually(empty)


async def test_a_stream_of_pictures_has_openais_events(cluster: Cluster, crew: Crew) -> None:
    body = {"model": crew.model, "prompt": "a cat", "partial_images": 2, "echo": {"size": 1024 * 1024}}
    events = [
        json.loads(line) async for line in cluster.stream(body, path="/v1/images/generations") if line != "[DONE]"
    ]
    kinds = [event["type"] for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert len(base64.b64decode(events[-1]["b64_json"])) == 1024 * 1024


async def test_speech_is_passed_on_as_it_is_made(cluster: Cluster, crew: Crew) -> None:
    """The first sound is there while the rest is still being made."""
    body = {
        "model": crew.model,
        "input": "word " * 40,
        "voice": "alloy",
        "response_format": "wav",
        "echo": {"delay_ms": 20},
    }
    async with cluster.http.stream("POST", cluster.url + "/v1/audio/speech", json=body) as response:
        assert (response.status_code, response.headers["content-type"]) == (200, "audio/wav")
        assert "content-length" not in response.headers
        pieces = [piece async for piece in response.aiter_raw()]
    assert pieces[0][:4] == b"RIFF"
    assert len(pieces) > 3


async def test_speech_that_breaks_off_does_not_end_like_a_success(cluster: Cluster, crew: Crew) -> None:
    body = {"model": crew.model, "input": "word " * 40, "voice": "alloy", "response_format": "wav"}
    recorded = cluster.record(body | {"echo": {"fail": "mid", "delay_ms": 5}}, path="/v1/audio/speech")
    await recorded.end()
    assert recorded.status == 200
    assert recorded.broken is not None


async def test_speech_that_fails_before_its_first_sound_is_an_error(cluster: Cluster, crew: Crew) -> None:
    body = {
        "model": crew.model,
        "input": "hello",
        "voice": "alloy",
        "response_format": "wav",
        "echo": {"fail": "error"},
    }
    answer = await cluster.post("/v1/audio/speech", body)
    assert answer.status_code == 502
    assert answer.json()["error"]["type"] == "backend_error"


async def test_speech_as_events(cluster: Cluster, crew: Crew) -> None:
    body = {
        "model": crew.model,
        "input": "hello there",
        "voice": "alloy",
        "response_format": "wav",
        "stream_format": "sse",
    }
    events = [json.loads(line) async for line in cluster.stream(body, path="/v1/audio/speech") if line != "[DONE]"]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert events[-1]["type"] == "speech.audio.done"


@pytest.mark.parametrize("size", [100, 300_000, 25 * 1024 * 1024], ids=["small", "inline", "by-reference"])
async def test_an_upload_arrives_byte_for_byte(
    cluster: Cluster, crew: Crew, blobs: Any, eventually: Eventually, size: int
) -> None:
    """Chunked, so that nobody knows its size beforehand."""
    data = bytes(range(251)) * (size // 251 + 1)
    files = {"file": ("a.wav", data[:size], "audio/wav")}
    answer = await cluster.http.post(
        cluster.url + "/v1/audio/transcriptions", data={"model": crew.model, "response_format": "json"}, files=files
    )
    assert answer.status_code == 200, answer.text
    assert hashlib.sha256(data[:size]).hexdigest() in answer.json()["text"]

    async def empty() -> bool:
        return await blobs() == 0

    await eventually(empty)


@pytest.mark.parametrize("kind", ["json", "text", "srt", "vtt", "verbose_json"])
async def test_transcripts_in_every_format(cluster: Cluster, crew: Crew, kind: str) -> None:
    answer = await cluster.http.post(
        cluster.url + "/v1/audio/transcriptions",
        data={"model": crew.model, "response_format": kind},
        files={"file": ("a.wav", b"RIFF....", "audio/wav")},
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/json" if "json" in kind else "text/")


async def test_rerank(cluster: Cluster, crew: Crew) -> None:
    body = {"model": crew.model, "query": "green tea", "documents": ["coffee", "tea that is green", "tea"], "top_n": 2}
    results = (await cluster.post("/v1/rerank", body)).json()["results"]
    assert [result["index"] for result in results] == [1, 2]


async def test_a_form_that_is_wrong_is_refused_in_openais_shape(cluster: Cluster, crew: Crew) -> None:
    url = cluster.url + "/v1/audio/transcriptions"
    as_json = await cluster.http.post(url, json={"model": crew.model})
    without_file = await cluster.http.post(url, data={"model": crew.model}, files={"x": (None, b"1")})
    for answer in (as_json, without_file):
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    unknown = await cluster.http.post(url, data={"model": "none"}, files={"file": ("a.wav", b"x", "audio/wav")})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_nothing_large_is_left_after_a_failure_or_a_hang_up(
    cluster: Cluster, crew: Crew, blobs: Any, eventually: Eventually
) -> None:
    size = 1024 * 1024
    failing = await cluster.post(
        "/v1/images/generations", {"model": crew.model, "prompt": "x" * 30_000, "echo": {"size": size, "fail": "mid"}}
    )
    assert failing.status_code == 502
    big = "y" * size
    recorded = crew.ask(big, echo={"delay_ms": 50, "tokens": 2000})

    async def running() -> bool:
        return await crew.runs(1)

    async def empty() -> bool:
        return await blobs() == 0 and await crew.idle()

    await eventually(running)
    assert await blobs() > 0
    await recorded.hang_up()
    await eventually(empty)


async def test_a_large_answer_survives_the_death_of_its_worker(cluster: Cluster) -> None:
    """The first worker dies while it makes the picture; the second one's comes through whole."""
    crew = Crew(cluster, "dies")
    first = await crew.start()
    body = {"model": crew.model, "prompt": "noise", "echo": {"size": 2 * 1024 * 1024, "delay_ms": 300}}
    recorded = cluster.record(body, path="/v1/images/generations")
    while not await crew.runs(1):
        await asyncio.sleep(0.02)
    await crew.start(wait=False)
    crew.kill(first)
    await recorded.end()
    assert recorded.status == 200
    assert len(base64.b64decode(json.loads(recorded.body)["data"][0]["b64_json"])) == 2 * 1024 * 1024
    await crew.stop()
