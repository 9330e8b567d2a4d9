"""What the echo adapter can be told: every endpoint, each with the field `echo`."""

from __future__ import annotations

from functools import lru_cache

from schemas.descriptors import JSON, EndpointDescriptor, ModelDescriptor
from schemas.parameters import audio, images, text, vectors
from schemas.parameters.fields import advanced
from schemas.parameters.images import PictureOptions
from schemas.parameters.text import TextFeatures
from workers.backends.echo.media import EMBEDDING_LENGTH, SIDE

BEHAVIOR: JSON = advanced(
    {
        "type": "object",
        "title": "Behavior",
        "description": 'Delays, sizes and failures for tests: `{"delay_ms": 20}`.',
        "x-nexus-widget": "json",
    }
)
IGNORED = frozenset(
    {
        *("temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty", "best_of", "logit_bias"),
        *("logprobs", "user"),
    }
)
"""Parameters that do not change the answer."""
PICTURES = PictureOptions(defaults={"size": f"{SIDE}x{SIDE}"})


@lru_cache(maxsize=1)
def descriptor() -> ModelDescriptor:
    """Return the descriptor of all models."""
    words = TextFeatures(vision=True, tools=False, structured=False, lacks=IGNORED)
    endpoints = {
        "/v1/chat/completions": text.chat(words),
        "/v1/completions": text.completions(words),
        "/v1/embeddings": vectors.embeddings(EMBEDDING_LENGTH),
        "/v1/images/generations": images.generations(PICTURES),
        "/v1/images/edits": images.edits(PICTURES, several=True),
        "/v1/audio/speech": audio.speech(("echo",), instructions=False),
        "/v1/audio/transcriptions": audio.transcriptions(),
        "/v1/audio/translations": audio.translations(),
        "/v1/rerank": vectors.rerank(),
        "/v1/score": vectors.score(),
        "/v1/moderations": vectors.moderations(),
    }
    return ModelDescriptor(endpoints={path: _with_behavior(one) for path, one in endpoints.items()})


def _with_behavior(endpoint: EndpointDescriptor) -> EndpointDescriptor:
    parameters = endpoint.parameters
    properties = parameters["properties"] | {"echo": BEHAVIOR}
    return EndpointDescriptor(parameters=parameters | {"properties": properties}, example=endpoint.example)
