"""The workers by host, those that vanished a while ago included: who looks for a machine that is gone must see that it was there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backbone.registry.registry import Registry
from gateway.clock import now
from schemas.presence import RegistrySnapshot, WorkerPresence

REMEMBERED_S = 900.0
"""A worker that vanished is listed for this time."""
MAX_REMEMBERED = 200


class HostDirectory:
    """Follows the registry, and remembers workers that vanished from it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._live: Mapping[str, WorkerPresence] = {}
        self._vanished: dict[str, tuple[WorkerPresence, float]] = {}
        """The last presence of each, and when it vanished, in Unix seconds."""
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Follow the registry, which has started."""
        self._unsubscribe = self._registry.subscribe(self._load)
        if self._registry.snapshot is not None:
            self._load(self._registry.snapshot)

    async def close(self) -> None:
        """Stop."""
        self._unsubscribe()

    def _load(self, snapshot: RegistrySnapshot) -> None:
        at = now()
        for worker_id, presence in self._live.items():
            if worker_id not in snapshot.workers:
                self._vanished[worker_id] = presence, at
        self._live = snapshot.workers
        recent = [
            (name, seen) for name, seen in self._vanished.items() if name not in self._live and _is_kept(seen, at)
        ]
        self._vanished = dict(recent[-MAX_REMEMBERED:])

    def hosts(self) -> list[dict[str, Any]]:
        """Return the hosts by name, each with its workers. A host is gone if all of them are."""
        at, hosts = now(), dict[str, list[dict[str, Any]]]()
        for presence in self._live.values():
            hosts.setdefault(presence.host, []).append(presence.model_dump(mode="json") | {"gone_at": None})
        for presence, gone_at in self._vanished.values():
            if _is_kept((presence, gone_at), at):
                former = presence.model_dump(mode="json") | {"gone_at": int(gone_at), "busy": 0}
                hosts.setdefault(presence.host, []).append(former)
        return [_host(name, hosts[name]) for name in sorted(hosts)]


def _is_kept(seen: tuple[WorkerPresence, float], at: float) -> bool:
    return at - seen[1] < REMEMBERED_S


def _host(name: str, workers: list[dict[str, Any]]) -> dict[str, Any]:
    live = [worker for worker in workers if worker["gone_at"] is None]
    return {
        "host": name,
        "object": "host",
        "gone_at": None if live else max(worker["gone_at"] for worker in workers),
        "slots": sum(worker["slots"] for worker in live),
        "busy": sum(worker["busy"] for worker in live),
        "workers": sorted(workers, key=lambda worker: (worker["gone_at"] is not None, worker["id"])),
    }
