"""The kinds of content that a model takes and makes, by its descriptor. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.descriptors import JSON, EndpointDescriptor, ModelDescriptor, file_types
from schemas.endpoints import BY_PATH, Capability

OUTPUTS = {
    Capability.EMBEDDINGS: "embedding",
    Capability.IMAGES: "image",
    Capability.SPEECH: "audio",
    Capability.RERANK: "score",
    Capability.MODERATIONS: "score",
}
"""What models of a capability answer; all others answer text."""


def modalities_of(descriptor: ModelDescriptor) -> JSON:
    """Return the kinds of `input` and `output`: `text`, `image`, `audio`, `embedding`, `score`."""
    return {
        "input": sorted({kind for path, one in descriptor.endpoints.items() for kind in _inputs(path, one)}),
        "output": sorted({OUTPUTS.get(BY_PATH[path].capability, "text") for path in descriptor.endpoints}),
    }


def _inputs(path: str, endpoint: EndpointDescriptor) -> Iterator[str]:
    for schema in endpoint.parameters["properties"].values():
        for media in (*file_types(schema), *schema.get("x-nexus-media", ())):
            yield media.partition("/")[0]
    if BY_PATH[path].capability is not Capability.TRANSCRIPTIONS:
        yield "text"
