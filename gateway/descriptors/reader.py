"""Find the descriptor of a model among those of its workers. Nothing is parsed before a caller asks for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
import structlog

from gateway.descriptors.bounds import find_violation
from gateway.descriptors.merge import merge_descriptors
from gateway.descriptors.modalities import modalities_of
from schemas.descriptors import JSON, DescriptorError, ModelDescriptor, digest_of, parse_descriptor
from schemas.endpoints import BY_PATH
from schemas.parameters.standard import features_of, standard_descriptor
from schemas.presence import ModelOffer, RegistrySnapshot, WorkerPresence, WorkerState

log = structlog.get_logger(__name__)

MAX_CACHED = 2048
"""Descriptors, and merged descriptors, that are kept in memory, of each."""
MAX_LISTED_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """What a model can be told, by all of its workers."""

    descriptor: ModelDescriptor
    digest: str
    modalities: JSON
    """The kinds of content that it takes and makes."""
    differing: tuple[str, ...]
    """Parameters that differ between the workers. They are left out, or in the narrower form."""
    problems: tuple[str, ...] = ()
    """Workers whose descriptor is invalid, with the reason. Their models have the usual parameters."""


def describe(descriptors: Sequence[ModelDescriptor]) -> DescribedModel:
    """Return what all of these descriptors allow."""
    common, differing = merge_descriptors(descriptors)
    return DescribedModel(common, digest_of(common.encode()), modalities_of(common), differing)


class DescriptorReader:
    """Reads descriptors of the newest snapshot. Workers are not trusted: a descriptor must have its digest, and be valid."""

    def __init__(self) -> None:
        self._snapshot = RegistrySnapshot()
        self._offers: dict[str, list[tuple[WorkerPresence, ModelOffer]]] | None = {}
        self._texts: dict[str, tuple[bytes, dict[str, str]]] = {}
        self._parsed: OrderedDict[str, ModelDescriptor | DescriptorError] = OrderedDict()
        """Descriptors by digest. A digest stands for one text, so they never change."""
        self._merged: OrderedDict[Hashable, DescribedModel] = OrderedDict()
        self._logged: OrderedDict[tuple[str, str], None] = OrderedDict()

    def load(self, snapshot: RegistrySnapshot) -> None:
        """Take the newest snapshot. Parses nothing."""
        self._snapshot, self._offers = snapshot, None

    def is_held(self, model: str) -> bool:
        """Return whether an operator holds the model's jobs."""
        return model in self._snapshot.holds

    def offers(self, model: str) -> list[tuple[WorkerPresence, ModelOffer]]:
        """Return the workers that offer a model, with their offers."""
        if self._offers is None:
            offers: dict[str, list[tuple[WorkerPresence, ModelOffer]]] = {}
            for worker in self._snapshot.workers.values():
                for offer in worker.models:
                    offers.setdefault(offer.name, []).append((worker, offer))
            self._offers = offers
            self._texts = {id_: found for id_, found in self._texts.items() if id_ in self._snapshot.descriptors}
        return self._offers.get(model, [])

    def of_model(self, model: str) -> DescribedModel | None:
        """Return what a model can be told, by its ready workers, or where none is ready by all; None without a worker."""
        offers = self.offers(model)
        ready = _ready(offers) or offers
        found: dict[Hashable, tuple[ModelDescriptor | None, ModelOffer]] = {}
        problems: list[str] = []
        for worker, offer in ready:
            descriptor = self._read(worker.id, offer.descriptor) if offer.descriptor else None
            if isinstance(descriptor, DescriptorError):
                problems.append(f"{worker.id}: {descriptor}")
                descriptor = None
            digest = offer.descriptor if descriptor is not None else ""
            key = (digest, offer.capabilities, offer.context_length, offer.voices, offer.embedding_length)
            found.setdefault(key, (descriptor, offer))
        merged = self._merge(found)
        if merged is None:
            return None
        return replace(merged, problems=tuple(problems[:MAX_LISTED_PROBLEMS])) if problems else merged

    def violation(self, model: str, path: str, values: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return a parameter that every ready worker of a model certainly refuses, and what it must be; None if one may accept it."""
        found: tuple[str, str] | None = None
        for worker, offer in _ready(self.offers(model)):
            descriptor = self._read(worker.id, offer.descriptor) if offer.descriptor else None
            endpoint = descriptor.endpoints.get(path) if isinstance(descriptor, ModelDescriptor) else None
            if endpoint is None or not endpoint.parameters.get("x-nexus-enforced"):
                return None
            found = find_violation(endpoint.parameters, values)
            if found is None:
                return None
        return found

    def _merge(self, found: Mapping[Hashable, tuple[ModelDescriptor | None, ModelOffer]]) -> DescribedModel | None:
        """Return what several workers have in common; None where none of them has an endpoint."""
        key = frozenset(found)
        known = self._merged.get(key)
        if known is None:
            descriptors = [one for given in found.values() if (one := _complete(*given)) is not None]
            if not descriptors:
                return None
            known = self._merged[key] = describe(descriptors)
        self._merged.move_to_end(key)
        _trim(self._merged)
        return known

    def _read(self, worker: str, digest: str) -> ModelDescriptor | DescriptorError | None:
        """Return a descriptor of a worker, or why it is invalid; None where it is not in the registry yet."""
        if digest not in self._parsed:
            text = self._texts_of(worker).get(digest)
            if text is None:
                return None
            if digest_of(text) != digest:
                return self._reject(worker, DescriptorError("a descriptor does not have its digest"))
            try:
                self._parsed[digest] = parse_descriptor(text)
            except DescriptorError as error:
                self._parsed[digest] = self._reject(worker, error)
        self._parsed.move_to_end(digest)
        _trim(self._parsed)
        return self._parsed[digest]

    def _reject(self, worker: str, error: DescriptorError) -> DescriptorError:
        if (worker, str(error)) not in self._logged:
            self._logged[worker, str(error)] = None
            _trim(self._logged)
            log.warning("catalog.descriptor_rejected", worker=worker, error=str(error))
        return error

    def _texts_of(self, worker: str) -> dict[str, str]:
        """Return the texts of a worker's descriptors by digest, as they are in the registry."""
        value = self._snapshot.descriptors.get(worker, b"")
        known = self._texts.get(worker)
        if known is None or known[0] is not value:
            known = self._texts[worker] = (value, _parse_texts(value))
        return known[1]


def _ready(offers: list[tuple[WorkerPresence, ModelOffer]]) -> list[tuple[WorkerPresence, ModelOffer]]:
    return [one for one in offers if one[0].state is WorkerState.READY]


def _parse_texts(value: bytes) -> dict[str, str]:
    try:
        texts = orjson.loads(value) if value else {}
    except orjson.JSONDecodeError:
        return {}
    return {digest: text for digest, text in texts.items() if isinstance(text, str)} if isinstance(texts, dict) else {}


def _complete(descriptor: ModelDescriptor | None, offer: ModelOffer) -> ModelDescriptor | None:
    """Return the descriptor of an offer's capabilities alone. One that it does not describe has the usual parameters of its endpoints."""
    usual = standard_descriptor(offer.capabilities, features_of(offer))
    if descriptor is None or usual is None:
        return usual
    own = {path: one for path, one in descriptor.endpoints.items() if path in usual.endpoints}
    described = {BY_PATH[path].capability for path in own}
    rest = {path: one for path, one in usual.endpoints.items() if BY_PATH[path].capability not in described}
    return ModelDescriptor(endpoints=own | rest)


def _trim(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > MAX_CACHED:
        cache.popitem(last=False)
