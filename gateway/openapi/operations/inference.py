"""The descriptions of chat, completions, embeddings and rerank."""

from __future__ import annotations

from gateway.openapi.operation import Operation
from gateway.openapi.operations.common import MODEL, PREFERENCES, STREAM, inference_responses
from gateway.openapi.shapes.text import ChatCompletion, EmbeddingList, Ranking, TextCompletion
from schemas.endpoints import ENDPOINTS
from schemas.openai.chat import ChatRequest
from schemas.openai.completions import CompletionRequest
from schemas.openai.embeddings import EmbeddingsRequest
from schemas.openai.rerank import RerankRequest

HELLO = {"role": "user", "content": "Say hello in one sentence."}

OPERATIONS = {
    "POST /v1/chat/completions": Operation(
        id="createChatCompletion",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Create a chat completion",
        description="Generate the model's next message in a conversation. With `stream: true`, the message arrives as events while the model generates it; "
        "the last event is `data: [DONE]`. Tools, images, JSON schemas and all other fields reach the inference server unchanged.",
        body=ChatRequest,
        examples={
            "A question": {"model": MODEL, "messages": [HELLO], "max_tokens": 40},
            "A stream": {
                "model": MODEL,
                "messages": [HELLO],
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        },
        responses=inference_responses(
            ChatCompletion,
            "The completion: one JSON object, or with `stream: true` a stream of `chat.completion.chunk` events.",
            STREAM,
        ),
        parameters=PREFERENCES,
    ),
    "POST /v1/completions": Operation(
        id="createCompletion",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Create a text completion (legacy)",
        description="Continue a prompt. The prompt is one text, several texts, or token ids.",
        body=CompletionRequest,
        examples={"A text": {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 20}},
        responses=inference_responses(
            TextCompletion, "The completion: one JSON object, or with `stream: true` a stream of events.", STREAM
        ),
        parameters=PREFERENCES,
    ),
    "POST /v1/embeddings": Operation(
        id="createEmbedding",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Create embeddings",
        description="Return one embedding for each text, in the order of the texts.",
        body=EmbeddingsRequest,
        examples={"Two texts": {"model": "multilingual-e5-small", "input": ["A cat.", "A dog."]}},
        responses=inference_responses(EmbeddingList, "The embeddings."),
        parameters=PREFERENCES,
    ),
    "POST /v1/rerank": Operation(
        id="rerank",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Rerank documents",
        description="Score documents by their relevance to a query, most relevant first. Request and response follow the APIs of Jina and Cohere.",
        body=RerankRequest,
        examples={
            "Two documents": {
                "model": "bge-reranker-v2-m3",
                "query": "What do cats eat?",
                "documents": ["Cats eat mice.", "Dogs bark."],
            }
        },
        responses=inference_responses(Ranking, "The documents' indexes and scores, most relevant first."),
        parameters=PREFERENCES,
    ),
}
OPERATIONS |= {
    f"POST {spec.path}": Operation(
        id=spec.description.operation_id,
        tag="inference",
        scope=spec.scope,
        runs_inference=True,
        summary=spec.description.summary,
        description=spec.description.text,
        body=spec.schema,
        examples={title: dict(body) for title, body in spec.description.examples.items()},
        responses=inference_responses(spec.description.answer, spec.description.answer_text),
        parameters=PREFERENCES,
    )
    for spec in ENDPOINTS
    if spec.description is not None
}
