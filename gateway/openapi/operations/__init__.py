"""The description of every route, by method and path, for readers and client generators."""

from __future__ import annotations

from gateway.openapi.operation import Operation
from gateway.openapi.operations import (
    audit,
    batches,
    inference,
    inspector,
    jobs,
    logs,
    media,
    messages,
    models,
    operators,
    overview,
    people,
    queues,
    responses,
    usage,
)

DESCRIPTION = """\
Nexus is one OpenAI-compatible gateway in front of many AI servers, with a durable queue behind it.

- **Keys.** All routes under `/v1` need `Authorization: Bearer KEY`, except `GET /v1/results/{name}`, whose signed URL is the permission.
- **Sessions.** People who have signed in at `/auth/login` use the same routes with a cookie, as far as their role allows. Unsafe methods then need
  the header `x-csrf-token`, from `GET /auth/session`.
- **Errors** have the form of OpenAI's error object; for Anthropic's routes, and with the header `anthropic-version`, that of Anthropic's. An unknown path returns 404, an unsupported method 405 with `Allow`, headers above the limit 431.
- **Compressed bodies** are accepted: `Content-Encoding: gzip`, `deflate` or `zstd`.
- **Durable jobs.** With `Prefer: respond-async`, every inference route returns 202 immediately; see `POST /v1/jobs`.
- **Idempotency.** Inference routes, `POST /v1/jobs` and `POST /v1/responses` take an `Idempotency-Key` (1 to 255 characters): requests of
  one owner with the same key become one job, which runs once. A different request with a used key is rejected.
- **Undocumented fields** reach the inference server unchanged if a route's schema allows additional properties.
"""
TAGS = {
    "inference": "OpenAI-compatible chat, completions, embeddings, images, audio and rerank.",
    "responses": "OpenAI's Responses API. Every response is a durable chat job.",
    "messages": "Anthropic's Messages API, on every chat model. The key may come in `x-api-key`; errors have the form of Anthropic's error object.",
    "jobs": "Durable jobs: submit, follow, cancel and retry requests that run later.",
    "files": "OpenAI's Files API: input and output files of batches, and files for jobs.",
    "batches": "OpenAI's Batch API: run many requests from one file.",
    "models": "The live models and voices.",
    "results": "Generated images and audio by signed URL.",
    "usage": "What teams, keys and models have used, from the ledger.",
    "people": "People who sign in with a browser, and their sessions.",
    "operation": "For operators: health, workers, queues, aliases, services, keys, dead letters, audit log.",
}
OPERATIONS: dict[str, Operation] = (
    inference.OPERATIONS
    | media.OPERATIONS
    | responses.OPERATIONS
    | messages.OPERATIONS
    | jobs.OPERATIONS
    | batches.OPERATIONS
    | models.OPERATIONS
    | operators.OPERATIONS
    | overview.OPERATIONS
    | queues.OPERATIONS
    | people.OPERATIONS
    | usage.OPERATIONS
    | audit.OPERATIONS
    | logs.OPERATIONS
    | inspector.OPERATIONS
)
