"""`/v1/embeddings` and `/v1/rerank` of an OpenAI-style server."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from functools import partial
from time import monotonic
from typing import Any

import orjson

from schemas.jobs import Usage
from workers.adapter_kit.embeddings import embeddings_body, embeddings_envelope, read_vectors
from workers.adapter_kit.error_mapping import CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED_ENDPOINT
from workers.adapter_kit.http_client import BackendResponse
from workers.adapter_kit.limitations import RESULT_TTL_S
from workers.adapter_kit.openai.client import (
    JSON,
    OpenAIClient,
    forwarded_fields,
    parse_json_response,
    rejects_parameter,
)
from workers.adapter_kit.openai.feature_probes import lacks_encoding_format, reranks_like_tei
from workers.adapter_kit.request_fields import parse_json_object
from workers.adapter_kit.rerank import RankingRequest, read_scores, rerank_body
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, ModelNotServed, Output, Task

ANSWER_LIMIT = 256 * 1024 * 1024
"""2,048 texts with 3,072 numbers each are half of it."""
FORMS = ("float", "base64")
INDEX = re.compile(rb'"index"\s*:\s*(\d+)')
WAYS = ((None, "/rerank", False), ("", "/rerank", False), ("", "/rerank", True), ("", "/v2/rerank", False))
"""Root (None: the API's), path, and whether it is TEI's. llama.cpp, vLLM and Jina have the first, Infinity the second,
Cohere the last."""
USUAL = 1
"""This way's path is also TEI's, which refuses the fields of the others."""
FORM = "encoding_format"


# Embeddings


async def embed(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Vectors in the form that the caller wants, whatever the server speaks; as they came where it speaks that."""
    body = parse_json_object(task.body)
    form = body.get("encoding_format") or "float"
    if form not in FORMS:
        raise BackendRefused(f"encoding_format may be {' or '.join(FORMS)}", param="encoding_format")
    response, data = await _vectors(api, forwarded_fields(body, task.model), task.model)
    answer, usage = _in_form(response, data, body, form, task.public_model)
    yield Chunk(answer)
    yield Finish(usage)


async def _vectors(api: OpenAIClient, fields: JSON, model: str) -> tuple[BackendResponse, bytes]:
    if api.limitations.lacks(model, FORM):
        fields.pop(FORM, None)
    try:
        return await api.post_and_read("/embeddings", fields, ANSWER_LIMIT)
    except BackendRefused as error:
        too_long = error.info.code == CONTEXT_LENGTH_EXCEEDED
        if too_long or FORM not in fields or not rejects_parameter(error, FORM, "base64"):
            raise
        if not await api.limitations.confirm(model, FORM, partial(lacks_encoding_format, api, model)):
            raise
    return await api.post_and_read("/embeddings", {name: fields[name] for name in fields if name != FORM}, ANSWER_LIMIT)


def _in_form(response: BackendResponse, data: bytes, body: JSON, form: str, model: str) -> tuple[bytes, Usage]:
    count, dimensions = _count(body.get("input")), body.get("dimensions")
    if dimensions is None and (quick := _as_it_came(data, form, count)):
        rest, items = quick
        usage = _usage(rest)
        return embeddings_envelope(items, {"model": model, "usage": _counted(usage)}), usage
    answer = parse_json_response(response, data)
    vectors = read_vectors(answer)
    if len(vectors) != count:
        raise BackendError(f"the backend gave {len(vectors)} embeddings for {count} inputs")
    other = next((len(vector) for vector in vectors if len(vector) != (dimensions or len(vector))), None)
    if other is not None:
        raise BackendRefused(
            f"the backend's vectors of this model have {other} numbers; dimensions may be that or be left out",
            param="dimensions",
        )
    usage = _usage(answer)
    tokens = _counted(usage)
    return embeddings_body(vectors, model=model, encoding_format=form, **tokens), usage


def _count(value: Any) -> int:
    """How many vectors an input is to have."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return len(value)
    return 1


def _as_it_came(data: bytes, form: str, count: int) -> tuple[JSON, bytes] | None:
    """The answer without its vectors, and these as JSON that was not read: they are most of it. None where that is not safe."""
    key = data.find(b'"data"')
    start, end = data.find(b"[", key), data.rfind(b"]")
    if key < 0 or not key < start < end:
        return None
    items = data[start : end + 1]
    try:
        rest = orjson.loads(b"%bnull%b" % (data[:start], data[end + 1 :]))
        first = orjson.loads(items[1 : items.find(b"}") + 1])["embedding"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    in_form = (
        isinstance(first, str)
        if form == "base64"
        else bool(first) and isinstance(first, list) and isinstance(first[0], float)
    )
    in_order = [int(index) for index in INDEX.findall(items)] == list(range(count))
    if not in_form or not in_order or items.count(b"{") != count or "data" not in rest or rest["data"] is not None:
        return None
    return rest, items


def _usage(answer: JSON) -> Usage:
    found = answer.get("usage")
    usage: JSON = found if isinstance(found, dict) else {}
    tokens = usage.get("prompt_tokens")
    total = usage.get("total_tokens")
    prompt = tokens if isinstance(tokens, int) else 0
    return Usage(prompt_tokens=prompt, total_tokens=total if isinstance(total, int) else prompt)


def _counted(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}


# Rerank


async def rerank(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """The ranking in the shape of Jina and Cohere, by the first of the known ways that the server has."""
    request = RankingRequest.from_task(task)
    scores, tokens = await _scores(api, request, task.model)
    yield Chunk(rerank_body(request, scores, model=task.public_model, tokens=tokens))
    yield Finish(Usage(prompt_tokens=tokens, total_tokens=tokens))


async def _scores(api: OpenAIClient, request: RankingRequest, model: str) -> tuple[list[tuple[int, float]], int]:
    way, until = api.rerank_routes.get(model, (None, 0.0))
    refused: BackendRefused | None = None
    for one in range(len(WAYS)) if way is None or until < monotonic() else (way,):
        try:
            found = await _ranked(api, request, model, one)
        except ModelNotServed:
            raise
        except BackendRefused as error:
            if error.info.code == CONTEXT_LENGTH_EXCEEDED:
                raise  # no other way makes the input smaller
            if refused is None or _no_such_way(refused):
                refused = error
            if one == USUAL and not _no_such_way(error) and await _is_teis(api, model):
                refused = None
            elif not _no_such_way(error):
                break
        else:
            api.rerank_routes[model] = (
                one,
                until if one == way and until > monotonic() else monotonic() + RESULT_TTL_S,
            )
            return found
    assert refused is not None
    if _no_such_way(refused):
        api.rerank_routes.pop(model, None)
    raise refused


async def _ranked(
    api: OpenAIClient, request: RankingRequest, model: str, way: int
) -> tuple[list[tuple[int, float]], int]:
    root, path, is_tei = WAYS[way]
    fields = _teis(request) if is_tei else _fields(request, model)
    response, answer = await api.post_and_read(path, fields, ANSWER_LIMIT, root=root)
    return read_scores(parse_json_response(response, answer))


async def _is_teis(api: OpenAIClient, model: str) -> bool:
    """Whether the path that refused the usual fields is TEI's: a request that is wrong is refused there as well."""
    return await api.limitations.confirm(model, "fields of Jina's rerank", partial(reranks_like_tei, api, model))


def _fields(request: RankingRequest, model: str) -> JSON:
    fields = forwarded_fields(request.fields, model) | {"documents": request.texts, "top_n": request.top_n}
    fields.pop("return_documents", None)  # they are put in from the request
    return fields


def _teis(request: RankingRequest) -> JSON:
    return {"query": request.query, "texts": request.texts, "truncate": request.fields.get("truncate") is True}


def _no_such_way(error: BackendRefused) -> bool:
    return error.info.code == UNSUPPORTED_ENDPOINT
