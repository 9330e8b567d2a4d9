"""Describe a model of which only its offer is known: the endpoints' usual parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from schemas.descriptors import EndpointDescriptor, ModelDescriptor
from schemas.jobs import Capability
from schemas.parameters import audio, images, text, vectors
from schemas.parameters.images import PictureOptions
from schemas.parameters.text import TextFeatures
from schemas.presence import ModelOffer

ANY_TEXT = TextFeatures()
ANY_PICTURE = PictureOptions(enforced=False)


@dataclass(frozen=True, slots=True)
class StandardFeatures:
    """What the usual parameters depend on."""

    text: TextFeatures = ANY_TEXT
    voices: tuple[str, ...] = ()
    embedding_length: int | None = None


_BUILDERS: Mapping[Capability, Callable[[StandardFeatures], dict[str, EndpointDescriptor]]] = {
    Capability.CHAT: lambda features: {"/v1/chat/completions": text.chat(features.text)},
    Capability.COMPLETIONS: lambda features: {"/v1/completions": text.completions(features.text)},
    Capability.EMBEDDINGS: lambda features: {"/v1/embeddings": vectors.embeddings(features.embedding_length)},
    Capability.IMAGES: lambda _: {
        "/v1/images/generations": images.generations(ANY_PICTURE),
        "/v1/images/edits": images.edits(ANY_PICTURE, several=True),
    },
    Capability.SPEECH: lambda features: {"/v1/audio/speech": audio.speech(features.voices)},
    Capability.TRANSCRIPTIONS: lambda _: {
        "/v1/audio/transcriptions": audio.transcriptions(),
        "/v1/audio/translations": audio.translations(),
    },
    Capability.RERANK: lambda _: {"/v1/rerank": vectors.rerank(), "/v1/score": vectors.score()},
    Capability.MODERATIONS: lambda _: {"/v1/moderations": vectors.moderations()},
}


@lru_cache(maxsize=512)
def standard_descriptor(
    capabilities: tuple[Capability, ...], features: StandardFeatures | None = None
) -> ModelDescriptor | None:
    """Return the usual parameters of these capabilities; None where no endpoint has any of them. The result is shared."""
    features = features or StandardFeatures()
    builders = (_BUILDERS[one] for one in capabilities if one in _BUILDERS)
    endpoints = {path: found for build in builders for path, found in build(features).items()}
    return ModelDescriptor(endpoints=endpoints) if endpoints else None


def features_of(offer: ModelOffer) -> StandardFeatures:
    """Return what the usual parameters of an offered model depend on."""
    return StandardFeatures(TextFeatures(context_length=offer.context_length), offer.voices, offer.embedding_length)
