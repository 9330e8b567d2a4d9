"""Names of keys in etcd. Ids and model names hold `/`, `:` and anything else: they are percent-encoded into one part."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote


@dataclass(frozen=True, slots=True)
class Keys:
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

    def worker(self, worker_id: str) -> str:
        """Where a worker's presence is."""
        return self.workers + quote(worker_id, safe="")

    def model(self, name: str) -> str:
        """Where a model's catalogue entry is."""
        return self.models + quote(name, safe="")

    def worker_of(self, key: str) -> str | None:
        """The worker's id, or None when `key` is not a worker's."""
        return unquote(key.removeprefix(self.workers)) if key.startswith(self.workers) else None

    def model_of(self, key: str) -> str | None:
        """The model's name, or None when `key` is not in the catalogue."""
        return unquote(key.removeprefix(self.models)) if key.startswith(self.models) else None
