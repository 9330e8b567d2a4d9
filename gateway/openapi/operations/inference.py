"""Chat, completions, embeddings, rerank."""

from __future__ import annotations

from gateway.openapi.operation import Operation
from gateway.openapi.operations.common import MODEL, PREFERENCES, STREAM, inferred
from gateway.openapi.shapes.text import ChatCompletion, EmbeddingList, Ranking, TextCompletion
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
        works=True,
        summary="Chat",
        description="Answer a conversation with a model. With `stream: true` the answer comes as events while it is written, "
        "the last one `data: [DONE]`. Tools, images, JSON schemas and all other fields reach the inference server as they are.",
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
        answers=inferred(
            ChatCompletion,
            "The answer: one JSON object, or with `stream: true` events `chat.completion.chunk`.",
            STREAM,
        ),
        parameters=PREFERENCES,
    ),
    "POST /v1/completions": Operation(
        id="createCompletion",
        tag="inference",
        scope="inference",
        works=True,
        summary="Complete a text (legacy)",
        description="Continue a prompt. The prompt is a text, several texts, or token ids.",
        body=CompletionRequest,
        examples={"A text": {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 20}},
        answers=inferred(
            TextCompletion, "The continuation: one JSON object, or with `stream: true` events of the same kind.", STREAM
        ),
        parameters=PREFERENCES,
    ),
    "POST /v1/embeddings": Operation(
        id="createEmbedding",
        tag="inference",
        scope="inference",
        works=True,
        summary="Turn texts into vectors",
        description="Return one vector for each text, in the order of the texts.",
        body=EmbeddingsRequest,
        examples={"Two texts": {"model": "multilingual-e5-small", "input": ["A cat.", "A dog."]}},
        answers=inferred(EmbeddingList, "The vectors."),
        parameters=PREFERENCES,
    ),
    "POST /v1/rerank": Operation(
        id="rerank",
        tag="inference",
        scope="inference",
        works=True,
        summary="Order documents by relevance",
        description="Score documents by how well they answer a query, the best first. Request and answer are those of Jina and Cohere.",
        body=RerankRequest,
        examples={
            "Two documents": {
                "model": "bge-reranker-v2-m3",
                "query": "What do cats eat?",
                "documents": ["Cats eat mice.", "Dogs bark."],
            }
        },
        answers=inferred(Ranking, "The documents' places and scores."),
        parameters=PREFERENCES,
    ),
}
