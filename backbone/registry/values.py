"""Decodes the values of keys in etcd. An unreadable value is logged and counts as missing.

Nexus writes workers and models. Operators and scripts write aliases and service records: for those the key holds the name, and
an alias may also be a bare JSON string or a list.
"""

from __future__ import annotations

from typing import TypeVar

import structlog
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from backbone.registry.keys import RegistryKeys
from schemas.descriptors import MAX_WORKER_BYTES
from schemas.presence import Alias, CatalogEntry, ModelHold, ServiceRecord, WorkerPresence

log = structlog.get_logger(__name__)
Record = TypeVar("Record", bound=BaseModel)


class RegistryReader:
    """Decodes entries under one prefix. Each method returns None when `key` is of another kind, or the value is missing or
    unreadable.
    """

    def __init__(self, keys: RegistryKeys) -> None:
        self._keys = keys

    def worker(self, key: str, value: bytes | None) -> WorkerPresence | None:
        """Return a worker's presence."""
        worker_id = self._keys.worker_of(key)
        worker = None if worker_id is None else _parse(WorkerPresence, key, value)
        if worker is not None and worker.id != worker_id:
            _malformed(key, "the id in the value differs from the key")
            return None
        return worker

    def model(self, key: str, value: bytes | None) -> CatalogEntry | None:
        """Return a model's catalog entry."""
        name = self._keys.model_of(key)
        entry = None if name is None else _parse(CatalogEntry, key, value)
        if entry is not None and entry.name != name:
            _malformed(key, "the name in the value differs from the key")
            return None
        return entry

    def descriptors(self, key: str, value: bytes | None) -> tuple[str, bytes] | None:
        """Return a worker's id and the descriptors of its models, unparsed."""
        worker_id = self._keys.descriptors_of(key)
        if not worker_id or value is None:
            return None
        if len(value) > MAX_WORKER_BYTES:
            _malformed(key, f"the descriptors of a worker may have {MAX_WORKER_BYTES} bytes")
            return None
        return worker_id, value

    def alias(self, key: str, value: bytes | None) -> Alias | None:
        """Return an alias: `{"targets": ["a", "b"]}`, `["a", "b"]` or `"a"`."""
        name = self._keys.alias_of(key)
        if not name or value is None:
            return None
        try:
            value_json = from_json(value)
        except ValueError as error:
            _malformed(key, f'{error}; an alias is {{"targets": ["model", …]}}, a list or a string, in JSON')
            return None
        targets = value_json.get("targets") if isinstance(value_json, dict) else value_json
        unsupported = value_json.get("unsupported_parameters") if isinstance(value_json, dict) else None
        if unsupported not in (None, "refuse", "adapt"):
            _malformed(key, "unsupported_parameters of an alias must be 'refuse' or 'adapt'; the value is ignored")
            unsupported = None
        targets = [targets] if isinstance(targets, str) else targets
        if not isinstance(targets, list) or not targets or not all(isinstance(one, str) and one for one in targets):
            _malformed(key, "the targets of an alias must be a list of models")
            return None
        return Alias(name=name, targets=tuple(dict.fromkeys(targets)), unsupported_parameters=unsupported)

    def service(self, key: str, value: bytes | None) -> ServiceRecord | None:
        """Return a service record; unknown fields are preserved."""
        name = self._keys.service_of(key)
        if not name or value is None:
            return None
        try:
            value_json = from_json(value)
            return ServiceRecord.model_validate(
                {**value_json, "name": name} if isinstance(value_json, dict) else value_json
            )
        except ValueError as error:  # pydantic's ValidationError is one
            _malformed(key, str(error))
            return None

    def hold(self, key: str, value: bytes | None) -> ModelHold | None:
        """Return the hold of a model's jobs."""
        model = self._keys.hold_of(key)
        hold = None if model is None else _parse(ModelHold, key, value)
        if hold is not None and hold.model != model:
            _malformed(key, "the model in the value differs from the key")
            return None
        return hold


def _parse(kind: type[Record], key: str, value: bytes | None) -> Record | None:
    if value is None:
        return None
    try:
        return kind.model_validate_json(value)
    except ValidationError as error:
        _malformed(key, str(error))
        return None


def _malformed(key: str, error: str) -> None:
    log.warning("registry.value_malformed", key=key, error=error)
