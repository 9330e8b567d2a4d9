"""`/v1/rerank` for every adapter: the parsed request, and the answer in Jina's and Cohere's form. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from schemas.openai.rerank import RerankDocument
from schemas.openai.rerank import RerankRequest as Fields
from workers.adapter_kit.request_fields import JSON, parse_json_object
from workers.backends.base import BackendError, BackendRefused, Task

ENDPOINT = "/v1/rerank"
WRONG_RANKING_MESSAGE = "the backend's answer is not a ranking of the documents"


@dataclass(frozen=True, slots=True)
class RankingRequest:
    """A caller's request to rank documents, checked."""

    query: str
    texts: tuple[str, ...]
    documents: tuple[Any, ...]
    """The documents as the caller sent them: texts, or objects with a `text`."""
    top_n: int
    return_documents: bool
    fields: JSON
    """The whole body."""

    @classmethod
    def from_task(cls, task: Task) -> RankingRequest:
        """Parse a task. Raises BackendRefused for another endpoint, or where a field is wrong."""
        if task.endpoint != ENDPOINT:
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        body = parse_json_object(task.body)
        try:
            fields = Fields.model_validate({"model": task.model} | body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = str(first["loc"][0]) if first["loc"] else None
            raise BackendRefused(f"{name}: {first['msg']}", param=name) from error
        return cls(
            query=fields.query,
            texts=tuple(one.text if isinstance(one, RerankDocument) else one for one in fields.documents),
            documents=tuple(body["documents"]),
            top_n=min(fields.top_n or len(fields.documents), len(fields.documents)),
            return_documents=bool(fields.return_documents),
            fields=body,
        )


def rerank_body(
    request: RankingRequest, scores: Iterable[tuple[int, float]], *, model: str, tokens: int = 0, identity: str = ""
) -> bytes:
    """Return the answer: the `top_n` best of `scores` (index and score), best first.

    Raises BackendError when there are fewer scores, or an index belongs to no document.
    """
    ranked = sorted(scores, key=lambda one: -one[1])
    indexes = {index for index, _ in ranked}
    if not indexes <= set(range(len(request.texts))) or len(indexes) < request.top_n or len(indexes) < len(ranked):
        raise BackendError(WRONG_RANKING_MESSAGE)
    results: list[JSON] = []
    for index, score in ranked[: request.top_n]:
        document = request.documents[index]
        content = {"text": document} if isinstance(document, str) else document
        results.append(
            {"index": index, "relevance_score": score} | ({"document": content} if request.return_documents else {})
        )
    answer: JSON = {"object": "list", "model": model, "results": results}
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(({"id": identity} if identity else {}) | answer | {"usage": usage})


def read_scores(answer: Any) -> tuple[list[tuple[int, float]], int]:
    """Return index and score of each result of a server's answer, and the tokens that the server counted. Raises BackendError.

    Servers give `{"results": [{"index", "relevance_score" or "score"}]}`, or (TEI) the list alone.
    """
    try:
        results = answer if isinstance(answer, list) else answer["results"]
        scores = [
            (int(one["index"]), float(one["relevance_score"] if "relevance_score" in one else one["score"]))
            for one in results
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(WRONG_RANKING_MESSAGE) from error
    return scores, _tokens(answer)


def _tokens(answer: Any) -> int:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0
