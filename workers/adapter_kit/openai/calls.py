"""Find the call of an OpenAI-style server that answers a task."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import orjson
from pydantic import ValidationError

from schemas.endpoints import BY_PATH, INPUT_TOKENS
from schemas.jobs import Capability, Usage
from schemas.openai.score import ScoreRequest
from workers.adapter_kit.error_mapping import UNSUPPORTED_ENDPOINT
from workers.adapter_kit.openai.audio import synthesize_speech, transcribe
from workers.adapter_kit.openai.client import OpenAIClient, forwarded_fields, parse_json_response
from workers.adapter_kit.openai.embeddings import embed, request_scores, rerank
from workers.adapter_kit.openai.images import generate_images
from workers.adapter_kit.openai.text import generate_text
from workers.adapter_kit.openai.token_counts import count_tokens
from workers.adapter_kit.request_fields import parse_json_object
from workers.adapter_kit.rerank import RankingRequest
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output, Task

Call = Callable[[OpenAIClient, Task], AsyncGenerator[Output]]
ANSWER_LIMIT = 64 * 1024 * 1024
CALLS: Mapping[Capability, Call] = {
    Capability.CHAT: generate_text,
    Capability.COMPLETIONS: generate_text,
    Capability.EMBEDDINGS: embed,
    Capability.IMAGES: generate_images,
    Capability.SPEECH: synthesize_speech,
    Capability.TRANSCRIPTIONS: transcribe,
    Capability.RERANK: rerank,
}
"""The calls that translate between the caller's form and the server's."""


def call_of(task: Task) -> Call:
    """Return the call that answers the task. Raises BackendRefused where OpenAI-style servers have none."""
    spec = BY_PATH.get(task.endpoint)
    if task.endpoint == "/v1/score":
        return score
    if task.endpoint == INPUT_TOKENS.path:
        return count_tokens
    call = relay if spec is not None and spec.relayed else CALLS.get(task.capability)
    if call is None:
        raise BackendRefused(f"this backend does not serve {task.endpoint}", code=UNSUPPORTED_ENDPOINT)
    return call


async def relay(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Pass on the server's answer as it is, but for the model's name.

    The server may have the endpoint within its API (`/v1/score`) or beside it (`/score`).
    """
    spec = BY_PATH[task.endpoint]
    fields = forwarded_fields(parse_json_object(task.body), task.model)
    name = task.endpoint.removeprefix("/v1")
    try:
        response, data = await api.post_and_read(name, fields, ANSWER_LIMIT)
    except BackendRefused as error:
        if error.info.code != UNSUPPORTED_ENDPOINT:
            raise
        response, data = await api.post_and_read(name, fields, ANSWER_LIMIT, root="")
    answer = parse_json_response(response, data)
    if spec.description is not None:
        try:
            spec.description.answer.model_validate(answer)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"])) or "the answer"
            raise BackendError(
                f"the backend's answer does not have the form of {spec.path}: {place}: {first['msg']}"
            ) from error
    found = answer.get("usage")
    usage = Usage.model_validate(found) if isinstance(found, dict) else None
    yield Chunk(orjson.dumps(answer | {"model": task.public_model}))
    yield Finish(usage)


async def score(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield the scores of pairs of texts, from the server's ranking where the server has no scores of its own.

    llama.cpp, text-embeddings-inference and Infinity have only the ranking. Its scores are those of the same model.
    """
    try:
        async with aclosing(relay(api, task)) as outputs:
            async for output in outputs:
                yield output
        return
    except BackendRefused as error:
        if error.info.code != UNSUPPORTED_ENDPOINT:
            raise
    request = ScoreRequest.model_validate(parse_json_object(task.body) | {"model": task.model})
    groups = [(request.left[0], request.right)]
    if len(request.left) > 1:
        groups = [(left, [right]) for left, right in zip(request.left, request.right, strict=True)]
    scores: list[float] = []
    total = 0
    for query, texts in groups:
        ranking = RankingRequest(query, tuple(texts), tuple(texts), len(texts), False, {"query": query})
        found, tokens = await request_scores(api, ranking, task.model)
        if sorted(index for index, _ in found) != list(range(len(texts))):
            raise BackendError("the backend's ranking lacks documents")
        scores += [value for _, value in sorted(found)]
        total += tokens
    usage = Usage(prompt_tokens=total, total_tokens=total)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    answer = {"id": f"score-{task.job}", "object": "list", "model": task.public_model, "data": data}
    yield Chunk(orjson.dumps(answer | {"usage": usage.model_dump()}))
    yield Finish(usage)
