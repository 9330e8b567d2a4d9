"""Say of each route, by method and path, what people and generators of clients need to know."""

from __future__ import annotations

from gateway.openapi.operation import Operation
from gateway.openapi.operations import batches, inference, jobs, media, models, operators, responses

DESCRIPTION = """\
Nexus is one OpenAI-compatible gateway in front of many AI servers, with a durable queue behind it.

- **Keys.** All routes under `/v1` take `Authorization: Bearer KEY`, except results by URL, whose URL is the permission.
- **Errors** are OpenAI's error object. A path that does not exist is 404, another method 405 with `Allow`, headers above the limit 431.
- **Compressed bodies** are accepted: `Content-Encoding: gzip`, `deflate` or `zstd`.
- **Durable jobs.** With `Prefer: respond-async` every inference route answers 202 at once; see `POST /v1/jobs`.
- **Idempotency.** Inference routes, `POST /v1/jobs` and `POST /v1/responses` take an `Idempotency-Key` (1 to 255 characters): requests of
  one owner with the same key are one job, which runs once. Another request with a used key is refused.
- **Fields that are not documented** reach the inference server untouched where a route's schema allows more properties.
"""
TAGS = {
    "inference": "Chat, completions, embeddings, pictures, sound and rerank, as OpenAI has them.",
    "responses": "OpenAI's Responses API. Every response is a durable chat job.",
    "jobs": "Requests that are answered later: submit, watch, cancel, retry.",
    "files": "OpenAI's Files API: inputs and outputs of batches, and files for jobs.",
    "batches": "OpenAI's Batch API: many requests from one file.",
    "models": "The models and voices that can be used now.",
    "results": "Pictures and sound by URL.",
    "operation": "For operators: health, workers, queues, aliases, services, keys, dead letters.",
}
OPERATIONS: dict[str, Operation] = (
    inference.OPERATIONS
    | media.OPERATIONS
    | responses.OPERATIONS
    | jobs.OPERATIONS
    | batches.OPERATIONS
    | models.OPERATIONS
    | operators.OPERATIONS
)
