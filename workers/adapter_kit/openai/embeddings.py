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
ENCODING_FORMATS = ("float", "base64")
INDEX = re.compile(rb'"index"\s*:\s*(\d+)')
RERANK_ROUTES = ((None, "/rerank", False), ("", "/rerank", False), ("", "/rerank", True), ("", "/v2/rerank", False))
"""The known routes for reranking: root (None: the API's), path, and whether it takes TEI's fields. llama.cpp, vLLM and Jina have
the first, Infinity the second, Cohere the last."""
TEI_SHARED_ROUTE = 1
"""The index of the route whose path TEI shares, with fields of its own."""
ENCODING_FORMAT = "encoding_format"


# Embeddings


async def embed(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield the vectors in the requested encoding, converted where the server uses the other one."""
    body = parse_json_object(task.body)
    encoding_format = body.get("encoding_format") or "float"
    if encoding_format not in ENCODING_FORMATS:
        raise BackendRefused(f"encoding_format must be {' or '.join(ENCODING_FORMATS)}", param="encoding_format")
    response, data = await _request_vectors(api, forwarded_fields(body, task.model), task.model)
    answer, usage = _convert_vectors(response, data, body, encoding_format, task.public_model)
    yield Chunk(answer)
    yield Finish(usage)


async def _request_vectors(api: OpenAIClient, fields: JSON, model: str) -> tuple[BackendResponse, bytes]:
    if api.limitations.lacks(model, ENCODING_FORMAT):
        fields.pop(ENCODING_FORMAT, None)
    try:
        return await api.post_and_read("/embeddings", fields, ANSWER_LIMIT)
    except BackendRefused as error:
        too_long = error.info.code == CONTEXT_LENGTH_EXCEEDED
        if too_long or ENCODING_FORMAT not in fields or not rejects_parameter(error, ENCODING_FORMAT, "base64"):
            raise
        if not await api.limitations.confirm(model, ENCODING_FORMAT, partial(lacks_encoding_format, api, model)):
            raise
    return await api.post_and_read(
        "/embeddings", {name: fields[name] for name in fields if name != ENCODING_FORMAT}, ANSWER_LIMIT
    )


def _convert_vectors(
    response: BackendResponse, data: bytes, body: JSON, encoding_format: str, model: str
) -> tuple[bytes, Usage]:
    count, dimensions = _expected_count(body.get("input")), body.get("dimensions")
    if dimensions is None and (split := _split_unparsed(data, encoding_format, count)):
        rest, items = split
        usage = _read_usage(rest)
        return embeddings_envelope(items, {"model": model, "usage": _token_counts(usage)}), usage
    answer = parse_json_response(response, data)
    vectors = read_vectors(answer)
    if len(vectors) != count:
        raise BackendError(f"the backend gave {len(vectors)} embeddings for {count} inputs")
    other = next((len(vector) for vector in vectors if len(vector) != (dimensions or len(vector))), None)
    if other is not None:
        raise BackendRefused(
            f"the backend's vectors of this model have {other} numbers; set dimensions to that, or leave it out",
            param="dimensions",
        )
    usage = _read_usage(answer)
    tokens = _token_counts(usage)
    return embeddings_body(vectors, model=model, encoding_format=encoding_format, **tokens), usage


def _expected_count(value: Any) -> int:
    """Return how many vectors an input must give."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return len(value)
    return 1


def _split_unparsed(data: bytes, encoding_format: str, count: int) -> tuple[JSON, bytes] | None:
    """Split an answer into its other fields, and its vectors as unparsed JSON, which are most of it; None where that is not safe."""
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
    is_same_encoding = (
        isinstance(first, str)
        if encoding_format == "base64"
        else bool(first) and isinstance(first, list) and isinstance(first[0], float)
    )
    in_order = [int(index) for index in INDEX.findall(items)] == list(range(count))
    if (
        not is_same_encoding
        or not in_order
        or items.count(b"{") != count
        or "data" not in rest
        or rest["data"] is not None
    ):
        return None
    return rest, items


def _read_usage(answer: JSON) -> Usage:
    found = answer.get("usage")
    usage: JSON = found if isinstance(found, dict) else {}
    tokens = usage.get("prompt_tokens")
    total = usage.get("total_tokens")
    prompt = tokens if isinstance(tokens, int) else 0
    return Usage(prompt_tokens=prompt, total_tokens=total if isinstance(total, int) else prompt)


def _token_counts(usage: Usage) -> dict[str, int]:
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}


# Rerank


async def rerank(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield the ranking in Jina's and Cohere's form, by the first of the known routes that the server has."""
    request = RankingRequest.from_task(task)
    scores, tokens = await request_scores(api, request, task.model)
    yield Chunk(rerank_body(request, scores, model=task.public_model, tokens=tokens))
    yield Finish(Usage(prompt_tokens=tokens, total_tokens=tokens))


async def request_scores(api: OpenAIClient, request: RankingRequest, model: str) -> tuple[list[tuple[int, float]], int]:
    """Return the index and score of each document, and the tokens, by the first of the known routes that the server has."""
    route, until = api.rerank_routes.get(model, (None, 0.0))
    refused: BackendRefused | None = None
    for one in range(len(RERANK_ROUTES)) if route is None or until < monotonic() else (route,):
        try:
            found = await _rank_by(api, request, model, one)
        except ModelNotServed:
            raise
        except BackendRefused as error:
            if error.info.code == CONTEXT_LENGTH_EXCEEDED:
                raise  # no other route makes the input smaller
            if refused is None or _is_unknown_route(refused):
                refused = error
            if one == TEI_SHARED_ROUTE and not _is_unknown_route(error) and await _is_tei(api, model):
                refused = None
            elif not _is_unknown_route(error):
                break
        else:
            api.rerank_routes[model] = (
                one,
                until if one == route and until > monotonic() else monotonic() + RESULT_TTL_S,
            )
            return found
    assert refused is not None
    if _is_unknown_route(refused):
        api.rerank_routes.pop(model, None)
    raise refused


async def _rank_by(
    api: OpenAIClient, request: RankingRequest, model: str, route: int
) -> tuple[list[tuple[int, float]], int]:
    root, path, is_tei = RERANK_ROUTES[route]
    fields = _tei_fields(request) if is_tei else _jina_fields(request, model)
    response, answer = await api.post_and_read(path, fields, ANSWER_LIMIT, root=root)
    return read_scores(parse_json_response(response, answer))


async def _is_tei(api: OpenAIClient, model: str) -> bool:
    """Return whether the path that refused the usual fields is TEI's; a wrong request is refused there as well."""
    return await api.limitations.confirm(model, "fields of Jina's rerank", partial(reranks_like_tei, api, model))


def _jina_fields(request: RankingRequest, model: str) -> JSON:
    fields = forwarded_fields(request.fields, model) | {"documents": request.texts, "top_n": request.top_n}
    fields.pop("return_documents", None)  # the documents are added from the request
    return fields


def _tei_fields(request: RankingRequest) -> JSON:
    return {"query": request.query, "texts": request.texts, "truncate": request.fields.get("truncate") is True}


def _is_unknown_route(error: BackendRefused) -> bool:
    return error.info.code == UNSUPPORTED_ENDPOINT
