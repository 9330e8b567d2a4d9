"""Strings of a request that a backend may open as a file or URL, and strings that are text."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import orjson
import pytest

from backbone.testing.blobs import MemoryBlobStore
from gateway.http.asgi import Headers
from gateway.http.inference_body import InferenceBodyReader
from gateway.http.media_fields import find_media_places, is_plain, searchable_fields
from gateway.http.request_body import parse_body, validate_body
from schemas.endpoints import BY_PATH, CHAT, EndpointSpec
from schemas.errors import InvalidRequest
from schemas.openai.chat import ChatRequest
from tests.unit.gateway.http.test_inference_body import reader, receive_of
from tests.unit.gateway.http.test_multipart import TYPE, form, part

U = "http://127.0.0.1/x"
SPELLINGS = [
    *(U, "HTTP://127.0.0.1/", "https://x.example/a.png", " http://x/", "\n\thttp://x/", "\x00http://x/", "\u00a0http://x/"),
    *("ht\ntp://x/", "http\t://x/", "http:x.example", "file:///etc/passwd", "file:/etc/passwd", "file:etc/passwd", "FILE:///x"),
    *("ftp://x/", "gopher://x/", "s3://bucket/key", "gs://b/k", "hf://models/x", "jar:http://x!/", "//x.example/a.png"),
    *("\\\\x\\share", "/etc/passwd.png", "../secret.png", "./a.png", "~/a.png", "C:\\secret.png", "/etc/hosts", "///" * 400),
    *("data:", "data:@x/", "data://x.example/a", "data:http://x/", "data: image/png,x", "DATA:text/plain,x", "data:a b,c"),
    *("<http://x/>", "<URL:http://x/>", '"http://x/"', "\ufeffhttp://x/", "\u200bhttp://x/", "\x7fhttp://x/", "/9j/../../etc/passwd"),
    *("//localhost/x", "unix:/run/x.sock", "http://x/ a", "rtsp://x/", "concat:/etc/passwd", "pipe:0", "javascript:x"),
]  # fmt: skip


def found_in(body: dict[str, Any], schema: Any = ChatRequest) -> list[str]:
    request = parse_body(orjson.dumps(body), schema)
    return [] if is_plain(request) else [place.param for place in find_media_places(searchable_fields(request))]


def message(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts), **more}]}


@pytest.mark.parametrize("url", SPELLINGS)
def test_no_spelling_of_an_address_is_media(url: str) -> None:
    for content in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "novelty", "novelty": [[{"deep": url}]]},
    ):
        assert found_in(message(content)), content


NAMES = [
    "image_url",
    "audio_url",
    "video_url",
    "file_url",
    "input_image",
    "input_audio",
    "input_video",
    "input_file",
    "source",
]


@pytest.mark.parametrize(
    "content",
    [
        *({"type": name, name: {"url": U}} for name in NAMES),
        *({"type": name, name: U} for name in NAMES),
        *({"type": name, name: [U]} for name in NAMES),
        {"type": "input_audio", "input_audio": {"data": U, "format": "wav"}},
        {"type": "input_video", "input_video": {"data": U}},
        {"type": "input_file", "file_url": U},
        {"type": "file", "file": {"file_data": U}},
        {"type": "image", "source": {"type": "url", "url": U}},
        {"type": "document", "source": {"type": "url", "url": U}},
        {"type": "image", "image": U},
        {"type": "video", "video": ["data:image/png;base64,AAAA", U]},
        {"type": "text", "text": "hi", "image_url": {"url": U}},
        {"type": "text", "text": {"url": U}},
        {"type": "text", "text": [U]},
        {"type": "thinking", "thinking": {"url": U}},
        {"type": "refusal", "refusal": {"type": "image_url", "image_url": {"url": U}}},
        {"type": ["text"], "text": U},
        {"type": "x", "text": U},
        {"image_url": U},
        {"Image_URL": {"URL": U}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "fallback": U}},
        {"type": "x", "content": [{"type": "image_url", "image_url": {"url": U}}]},
        {"type": "x", "content": {"type": "image_url", "image_url": U}},
        {"type": "x", "content": [[{"x": {"content": [U]}}]]},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": U}}]},
        {"type": "image_url", "image_url": {"url": ""}},
        {"type": "image_url", "image_url": {"url": "AAAA"}},
    ],
)
def test_an_address_is_found_in_a_part_of_any_shape(content: dict[str, Any]) -> None:
    for role in ("user", "system", "tool", "assistant"):
        body = {"model": "m", "messages": [{"role": role, "content": [{"type": "text", "text": "see"}, content]}]}
        assert found_in(body)


@pytest.mark.parametrize("name", ["images", "image_url", "audio", "attachments", "media", "video"])
def test_an_address_is_found_beside_the_content_of_a_message(name: str) -> None:
    for value in (U, [U], {"url": U}, [{"type": "image_url", "image_url": {"url": U}}]):
        assert found_in({"model": "m", "messages": [{"role": "user", "content": "hi", name: value}]})


def test_escapes_are_read_before_anything_is_decided() -> None:
    raw = orjson.dumps(message({"type": "image_url", "image_url": {"url": U}})).decode()
    for old, new in (
        ("image_url", "image_ur\\u006c"),
        ("http:", "\\u0068ttp:"),
        ("://", ":\\/\\/"),
        ("http", "ht\\ntp"),
    ):
        request = parse_body(raw.replace(old, new).encode(), ChatRequest)
        assert not is_plain(request)
        assert find_media_places(searchable_fields(request))


@pytest.mark.parametrize("name", ["image", "image_data", "images", "callback", "ref_audio", "mm_processor_kwargs", "x"])
@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
        (BY_PATH["/v1/completions"], {"model": "m", "prompt": "hi"}),
        (BY_PATH["/v1/embeddings"], {"model": "m", "input": "hi"}),
        (BY_PATH["/v1/rerank"], {"model": "m", "query": "hi", "documents": ["a"]}),
        (BY_PATH["/v1/audio/speech"], {"model": "m", "input": "hi"}),
        (BY_PATH["/v1/images/generations"], {"model": "m", "prompt": "hi"}),
    ],
    ids=lambda value: value.path if isinstance(value, EndpointSpec) else "",
)
async def test_an_address_in_a_field_of_the_backends_own_is_refused_at_every_endpoint(
    endpoint: EndpointSpec, body: dict[str, Any], name: str
) -> None:
    for value in (U, "file:/etc/passwd", "<http://x/>", {"url": U}, [{"deep": [U]}], {"$a": U}, {"$ref": {"url": U}}):
        wrong = {**body, name: value}
        for reading in (bodies().read_value(endpoint, wrong), read(endpoint, orjson.dumps(wrong))):
            with pytest.raises(InvalidRequest) as caught:
                await reading
            assert caught.value.info.code == "url_refused"
            assert str(caught.value.info.param).startswith(name)


@pytest.mark.parametrize(
    "endpoint", [BY_PATH["/v1/images/edits"], BY_PATH["/v1/audio/transcriptions"]], ids=lambda one: str(one.path)
)
async def test_an_address_in_a_field_of_a_form_is_refused(endpoint: EndpointSpec) -> None:
    file = part(endpoint.files[0], b"bytes", "a.bin", "image/png")
    fields = [part("model", b"m"), part("prompt", U.encode())]
    received = await read(endpoint, form(file, *fields), [(b"content-type", TYPE)])
    assert received.request.prompt == U
    for name in ("url", "url[]", "image_url", "ref"):
        with pytest.raises(InvalidRequest):
            await read(endpoint, form(file, *fields, part(name, U.encode())), [(b"content-type", TYPE)])


def test_a_voice_and_the_input_of_another_modality_may_be_media() -> None:
    said = {"model": "m", "input": U, "voice": U}
    assert found_in(said, BY_PATH["/v1/audio/speech"].schema) == ["voice"]
    assert found_in({**said, "voice": {"id": "x", "sample": U}}, BY_PATH["/v1/audio/speech"].schema) == ["voice.sample"]
    assert found_in({**said, "voice": "alloy"}, BY_PATH["/v1/audio/speech"].schema) == []
    embed = {"model": "m", "input": [U]}
    assert found_in(embed, BY_PATH["/v1/embeddings"].schema) == []
    for kind in ("image", "Audio", ["video"], " image", "image_url"):
        assert found_in({**embed, "modality": kind}, BY_PATH["/v1/embeddings"].schema) == ["input.0"]
    assert found_in({**embed, "modality": "text"}, BY_PATH["/v1/embeddings"].schema) == []


@pytest.mark.parametrize("kind", ["mcp", "web_search", "", ["function"]])
async def test_a_tool_that_the_backend_runs_holds_no_address(kind: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": kind, "server_url": U}]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    assert found_in(body) == ["tools.1.server_url"]
    with pytest.raises(InvalidRequest):
        await read(CHAT, orjson.dumps(body))


def test_an_embeddings_request_with_messages_is_searched_like_chat() -> None:
    body = {"model": "m", "input": "hi", **message({"type": "image_url", "image_url": {"url": U}})}
    assert found_in(body, BY_PATH["/v1/embeddings"].schema)


def mpeg(size: int) -> str:
    return b64encode(b"\xff\xfb\x90\x64" + bytes(size)).decode()


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": U, "$ref": U, "type": "object",
    "properties": {"a": {"$ref": U, "default": U, "enum": [U], "examples": [U], "description": U}},
}  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        message({"type": "text", "text": U}),
        message({"type": "text", "text": "see http://x.example/"}),
        message({"text": U}),
        message({"type": "input_text", "text": U}, {"type": "refusal", "refusal": U}, {"type": "thinking", "thinking": U}),
        message({"type": "text", "text": "Note: this", "cache_control": {"type": "ephemeral"}}),
        message({"type": "text", "text": "x", "annotations": [{"type": "url_citation", "url_citation": {"url": U}}]}),
        message({"type": "tool_use", "name": "open", "input": {"url": U}}),
        message({"type": "thinking", "thinking": U, "signature": "/abc+"}, {"type": "redacted_thinking", "data": "/abc+"}),
        message({"type": "image", "image": "/9j/4AAQSkZJRgABAQAAAQABAAD/\r\n4AAQSkZJRg=="}),
        message({"type": "tool_result", "content": U}),
        message({"type": "tool_result", "content": [{"type": "text", "text": U}]}),
        message({"type": "novelty", "content": "Note: this is text", "detail": "low"}),
        message({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}, "uuid": "u1"}),
        message({"type": "image_url", "image_url": 'data:image/svg+xml;charset=utf-8;x="y",%3Csvg/%3E'}),
        message({"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/AAAA"}}),
        message({"type": "image", "image": "data:image;base64,/9j/AAAA"}),
        message({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}),
        message({"type": "input_audio", "input_audio": {"data": mpeg(4000), "format": "mp3"}}),
        message({"type": "input_image", "image_url": "data:,x", "file_id": "file-1"}),
        message({"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9j/4AAQ"}}),
        message({"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}}),
        {"model": "m", "messages": [{"role": "user", "content": U}]},
        {"model": "m", "messages": [{"role": "assistant", "content": None, "reasoning_content": U, "annotations": [{"url": U}],
            "tool_calls": [{"id": U, "type": "function", "function": {"name": "f", "arguments": json.dumps({"url": U})}}]},
            {"role": "tool", "tool_call_id": U, "content": U}]},
        {"model": "m", "messages": [{"role": "assistant", "content": "x", "citations": [U], "search_results": [{"url": U}],
            "thinking_blocks": [{"type": "thinking", "thinking": U, "signature": "/a"}], "metadata": {"source": U}, "id": "a:1",
            "extra_content": {"google": {"thought_signature": "/abc"}}, "provider_specific_fields": {"citations": [U]}}],
         "tools": [{"type": "custom", "custom": {"name": "f", "description": U}}, {"name": "f", "description": U}],
         "bad_words": [U]},
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "user": U, "stop": [U], "metadata": {"a": U},
         "tools": [{"type": "function", "function": {"name": "f", "description": U, "parameters": SCHEMA}}],
         "tool_choice": {"type": "function", "function": {"name": U}}, "safety_identifier": U, "prompt_cache_key": U,
         "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "functions": [SCHEMA],
         "guided_json": SCHEMA, "structured_outputs": {"json": SCHEMA}, "chat_template": "{{ x }}// http://x",
         "prediction": {"type": "content", "content": U}, "documents": [{"title": "t", "text": "x", "url": U}],
         "my_schema": {"$schema": U}, "top_k": 5, "llama": "llama3:8b", "note": "Note: http://x", "logit_bias": {"1": 2},
         "numbers": [1, 2.5, None, True], "nested": {"a": [{"b": "//  a comment"}]}},
    ],
)  # fmt: skip
async def test_text_and_data_pass_untouched(body: dict[str, Any]) -> None:
    assert found_in(body) == []
    data = json.dumps(body).encode()
    assert (await read(CHAT, data)).body == data


async def test_texts_of_other_endpoints_pass() -> None:
    for endpoint, body in (
        (BY_PATH["/v1/completions"], {"model": "m", "prompt": [U], "suffix": U}),
        (BY_PATH["/v1/embeddings"], {"model": "m", "input": [U, "x"], "user": U}),
        (
            BY_PATH["/v1/rerank"],
            {"model": "m", "query": U, "documents": [U, {"text": U, "url": U}], "metadata": {"u": U}},
        ),
        (BY_PATH["/v1/audio/speech"], {"model": "m", "input": U, "voice": "alloy", "instructions": U}),
        (BY_PATH["/v1/images/generations"], {"model": "m", "prompt": U, "negative_prompt": U, "user": U}),
    ):
        await read(endpoint, orjson.dumps(body))


def test_numbers_of_a_field_are_not_searched_one_by_one() -> None:
    request = validate_body({**message({"type": "x", "x": [0.5] * 1000}), "embeds": [[0.5] * 1000]}, ChatRequest)
    assert find_media_places(searchable_fields(request)) == []


def bodies() -> InferenceBodyReader:
    return reader(MemoryBlobStore())


async def read(endpoint: EndpointSpec, body: bytes, headers: Headers | None = None) -> Any:
    return await bodies().read(endpoint, headers or [], receive_of(body), has_arrived=True)
