"""Names of keys in etcd.

Ids of workers and names of models hold `/`, `:` and anything else: they are percent-encoded into one part. Aliases and
services stand as they are named, since operators type these keys: `etcdctl put /nexus/aliases/org/model:tag …`.
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
        """The prefix of the catalogue."""
        return f"{self.prefix}models/"

    @property
    def aliases(self) -> str:
        """The prefix of all aliases."""
        return f"{self.prefix}aliases/"

    @property
    def services(self) -> str:
        """The prefix of all service records."""
        return f"{self.prefix}services/"

    def worker(self, worker_id: str) -> str:
        """Where a worker's presence is."""
        return self.workers + quote(worker_id, safe="")

    def model(self, name: str) -> str:
        """Where a model's catalogue entry is."""
        return self.models + quote(name, safe="")

    def alias(self, name: str) -> str:
        """Where an alias is."""
        return self.aliases + name

    def service(self, name: str) -> str:
        """Where a service's record is."""
        return self.services + name

    def worker_of(self, key: str) -> str | None:
        """The worker's id, or None when `key` is not a worker's."""
        return unquote(key.removeprefix(self.workers)) if key.startswith(self.workers) else None

    def model_of(self, key: str) -> str | None:
        """The model's name, or None when `key` is not in the catalogue."""
        return unquote(key.removeprefix(self.models)) if key.startswith(self.models) else None

    def alias_of(self, key: str) -> str | None:
        """The alias's name, or None when `key` is not an alias's."""
        return key.removeprefix(self.aliases) if key.startswith(self.aliases) else None

    def service_of(self, key: str) -> str | None:
        """The service's name, or None when `key` is not a service's."""
        return key.removeprefix(self.services) if key.startswith(self.services) else None
