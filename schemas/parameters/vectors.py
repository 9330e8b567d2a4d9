"""Build the parameters of embeddings, rerankers, scores and moderations."""

from __future__ import annotations

from schemas.descriptors import JSON, EndpointDescriptor
from schemas.parameters.fields import advanced, body, choice, flag, integer, prompt

TEXTS: JSON = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
TEXT_OR_TEXTS: JSON = {"anyOf": [{"type": "string", "minLength": 1}, TEXTS], "x-nexus-widget": "texts"}


def embeddings(length: int | None = None, *, dimensions: bool = True) -> EndpointDescriptor:
    """Return the parameters of `/v1/embeddings`. `length`: of an embedding. `dimensions`: whether shorter ones can be made."""
    texts: JSON = {
        "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}],
        "x-nexus-widget": "texts",
    }
    fields: dict[str, JSON] = {
        "input": {"title": "Texts", "description": "A text, several, or the same as token ids."} | texts
    }
    if dimensions:
        more = {"default": length} if length else {}
        fields["dimensions"] = advanced(
            integer("Dimensions", "The length of each vector.", least=1, most=length, **more)
        )
    fields["encoding_format"] = advanced(choice("Encoding", ("float", "base64"), default="float"))
    return EndpointDescriptor(
        parameters=body(fields, ("input",)), example={"input": ["The sea is calm.", "The ocean is still."]}
    )


def rerank() -> EndpointDescriptor:
    """Return the parameters of `/v1/rerank`."""
    document: JSON = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    fields: dict[str, JSON] = {
        "query": prompt("Query"),
        "documents": {
            "type": "array",
            "title": "Documents",
            "items": document,
            "minItems": 1,
            "x-nexus-widget": "texts",
        },
        "top_n": integer("Best documents", "How many documents to return; all, where it is missing.", least=1),
        "return_documents": advanced(flag("Return the documents")),
    }
    example: JSON = {"query": "What do cats eat?", "documents": ["Cats eat mice.", "Dogs bark.", "The sky is blue."]}
    return EndpointDescriptor(parameters=body(fields, ("query", "documents")), example=example)


def score() -> EndpointDescriptor:
    """Return the parameters of `/v1/score`."""
    fields = {"text_1": {"title": "First"} | TEXT_OR_TEXTS, "text_2": {"title": "Second"} | TEXT_OR_TEXTS}
    example: JSON = {"text_1": "What do cats eat?", "text_2": ["Cats eat mice.", "Dogs bark."]}
    return EndpointDescriptor(parameters=body(fields, fields), example=example)


def moderations() -> EndpointDescriptor:
    """Return the parameters of `/v1/moderations`."""
    texts: JSON = {
        "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": 100}],
        "x-nexus-widget": "texts",
    }
    return EndpointDescriptor(
        parameters=body({"input": {"title": "Input"} | texts}, ("input",)), example={"input": "I like you."}
    )
