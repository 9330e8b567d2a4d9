"""Names of keys in etcd.

Worker ids and model names may hold `/`, `:` and anything else: they are percent-encoded into one part. Aliases and services
stand as they are named, since operators type these keys: `etcdctl put /nexus/aliases/org/model:tag …`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote


@dataclass(frozen=True, slots=True)
class RegistryKeys:
    """The keys under one prefix; a missing slash at its end is added."""

    prefix: str

    def __post_init__(self) -> None:
        if not self.prefix.endswith("/"):
            object.__setattr__(self, "prefix", f"{self.prefix}/")

    @property
    def workers(self) -> str:
        """The prefix of all workers."""
        return f"{self.prefix}workers/"

    @property
    def models(self) -> str:
        """The prefix of the model catalog."""
        return f"{self.prefix}models/"

    @property
    def aliases(self) -> str:
        """The prefix of all aliases."""
        return f"{self.prefix}aliases/"

    @property
    def services(self) -> str:
        """The prefix of all service records."""
        return f"{self.prefix}services/"

    @property
    def holds(self) -> str:
        """The prefix of all holds."""
        return f"{self.prefix}holds/"

    @property
    def descriptors(self) -> str:
        """The prefix of the descriptors of all workers' models."""
        return f"{self.prefix}descriptors/"

    def worker(self, worker_id: str) -> str:
        """Return the key of a worker's presence."""
        return self.workers + quote(worker_id, safe="")

    def worker_descriptors(self, worker_id: str) -> str:
        """Return the key of the descriptors of a worker's models."""
        return self.descriptors + quote(worker_id, safe="")

    def model(self, name: str) -> str:
        """Return the key of a model's catalog entry."""
        return self.models + quote(name, safe="")

    def alias(self, name: str) -> str:
        """Return the key of an alias."""
        return self.aliases + name

    def service(self, name: str) -> str:
        """Return the key of a service's record."""
        return self.services + name

    def hold(self, model: str) -> str:
        """Return the key of the hold of a model's jobs."""
        return self.holds + quote(model, safe="")

    def worker_of(self, key: str) -> str | None:
        """Return the worker's id; None when `key` is not a worker's."""
        return unquote(key.removeprefix(self.workers)) if key.startswith(self.workers) else None

    def descriptors_of(self, key: str) -> str | None:
        """Return the id of the worker whose descriptors `key` holds; None when it holds none."""
        return unquote(key.removeprefix(self.descriptors)) if key.startswith(self.descriptors) else None

    def model_of(self, key: str) -> str | None:
        """Return the model's name; None when `key` is not in the catalog."""
        return unquote(key.removeprefix(self.models)) if key.startswith(self.models) else None

    def alias_of(self, key: str) -> str | None:
        """Return the alias's name; None when `key` is not an alias's."""
        return key.removeprefix(self.aliases) if key.startswith(self.aliases) else None

    def service_of(self, key: str) -> str | None:
        """Return the service's name; None when `key` is not a service's."""
        return key.removeprefix(self.services) if key.startswith(self.services) else None

    def hold_of(self, key: str) -> str | None:
        """Return the model's name; None when `key` is not a hold's."""
        return unquote(key.removeprefix(self.holds)) if key.startswith(self.holds) else None
