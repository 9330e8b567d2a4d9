"""The descriptors of a worker's models, as the adapter gives them: checked, and each encoded once."""

from __future__ import annotations

import json

from schemas.descriptors import (
    MAX_WORKER_BYTES,
    DescriptorError,
    ModelDescriptor,
    digest_of,
    parse_descriptor,
)
from schemas.presence import ModelOffer
from workers.backends.base import Backend

OVERHEAD_BYTES = 40
"""Of a descriptor in the JSON of all: its digest, quotes and a comma."""


class ModelDescriptors:
    """Describes the models of one backend. Models with equal descriptors share one; adapters return shared objects where they can."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._texts: dict[str, str] = {}
        self._known: dict[int, tuple[ModelDescriptor, str | DescriptorError]] = {}
        """By the object's identity, a descriptor with its digest, or why it cannot be published."""
        self.encoded = b""
        """The value for the registry: the texts of the descriptors by their digests. Empty: there are none."""

    def describe(self, models: tuple[ModelOffer, ...]) -> tuple[tuple[ModelOffer, ...], tuple[str, ...]]:
        """Return the models with the digests of their descriptors, and a problem for each that cannot be published.

        Such a model is served all the same, with the usual parameters of its endpoints.
        """
        known, self._known, texts, problems = self._known, {}, dict[str, str](), dict[str, None]()
        described: list[ModelOffer] = []
        size = 2
        for offer in models:
            try:
                digest, text = self._encode(offer, known)
                if digest and digest not in texts:
                    size += len(json.dumps(text)) + OVERHEAD_BYTES
                    if size > MAX_WORKER_BYTES:
                        raise DescriptorError(
                            f"the descriptors of this worker's models have more than {MAX_WORKER_BYTES} bytes"
                        )
                    texts[digest] = text
            except Exception as error:  # an adapter's mistake in a descriptor must not stop its work
                problems[f"The parameters of the model {offer.name!r} are not published: {error}."] = None
                digest = ""
            described.append(offer.model_copy(update={"descriptor": digest}) if digest else offer)
        if texts != self._texts:
            self._texts = texts
            self.encoded = json.dumps(texts).encode() if texts else b""
        return tuple(described), tuple(problems)

    def _encode(
        self, offer: ModelOffer, known: dict[int, tuple[ModelDescriptor, str | DescriptorError]]
    ) -> tuple[str, str]:
        """Return the digest and the text of an offer's descriptor; empty where the adapter describes nothing."""
        descriptor = self._backend.describe(offer)
        if descriptor is None:
            return "", ""
        found = self._known.get(id(descriptor)) or known.get(id(descriptor)) or (descriptor, _check(descriptor))
        self._known[id(descriptor)] = found
        if isinstance(found[1], DescriptorError):
            raise found[1]
        return found[1], self._texts.get(found[1]) or descriptor.encode()


def _check(descriptor: ModelDescriptor) -> str | DescriptorError:
    """Return the digest of a descriptor, or why it is invalid."""
    text = descriptor.encode()
    try:
        parse_descriptor(text)
    except DescriptorError as error:
        return error
    return digest_of(text)
