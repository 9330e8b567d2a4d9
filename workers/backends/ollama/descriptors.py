"""What a model of Ollama can be told, as a descriptor: pure."""

from __future__ import annotations

from schemas.descriptors import JSON, EndpointDescriptor
from schemas.jobs import Capability
from schemas.parameters import text, vectors
from schemas.parameters.fields import advanced, integer, slider
from schemas.parameters.text import TextFeatures
from schemas.presence import ModelOffer
from workers.backends.ollama.models import VISION, ModelDetails

TOOLS, THINKING = "tools", "thinking"
WITHOUT_EQUIVALENT = frozenset({"logit_bias", "best_of"})
"""Parameters that Ollama lacks, and that are left out. Others that it lacks are served by equivalents."""
OWN: dict[str, JSON] = {
    "top_k": advanced(integer("Top K", "Only so many of the most probable tokens.", least=0)),
    "min_p": advanced(
        slider("Min P", "Only tokens with this share of the best one's probability.", least=0.0, most=1.0, step=0.01)
    ),
    "repeat_penalty": advanced(slider("Repeat penalty", least=0.0, most=2.0, step=0.05)),
    "keep_alive": advanced(
        {
            "type": ["string", "integer"],
            "title": "Keep alive",
            "description": "How long the model stays in memory afterwards: `10m`; -1: without end.",
        }
    ),
}


def describe_model(offer: ModelOffer, details: ModelDetails) -> dict[str, EndpointDescriptor]:
    """Return the endpoints of a model."""
    features = TextFeatures(
        context_length=offer.context_length,
        vision=details.reported and VISION in details.capabilities,
        tools=not details.lacks(TOOLS),
        reasoning=details.reported and THINKING in details.capabilities,
        lacks=WITHOUT_EQUIVALENT,
    )
    endpoints: dict[str, EndpointDescriptor] = {}
    if Capability.CHAT in offer.capabilities:
        endpoints["/v1/chat/completions"] = text.chat(features, OWN)
    if Capability.COMPLETIONS in offer.capabilities:
        endpoints["/v1/completions"] = text.completions(features, OWN)
    if Capability.EMBEDDINGS in offer.capabilities:
        endpoints["/v1/embeddings"] = vectors.embeddings(offer.embedding_length)
    return endpoints
