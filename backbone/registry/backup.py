"""What is kept in etcd, as against what stands there under leases: aliases, service records, the catalogue of models."""

from __future__ import annotations

from backbone.registry.etcd_client import EtcdClient
from backbone.registry.keys import RegistryKeys


class RegistryBackup:
    """Reads and writes keys under one prefix, by what follows it. Raises Unavailable. The link is its owner's to open and close."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client = client
        self._keys = RegistryKeys(prefix)

    async def list_workers(self) -> list[str]:
        """The keys of workers that are there."""
        entries, _ = await self._client.list_prefix(self._keys.workers)
        return [entry.key.removeprefix(self._keys.workers) for entry in entries]

    async def read(self) -> dict[str, bytes]:
        """All keys without a lease, less the prefix."""
        entries, _ = await self._client.list_prefix(self._keys.prefix)
        return {entry.key.removeprefix(self._keys.prefix): entry.value for entry in entries if not entry.lease}

    async def operator_keys(self) -> list[str]:
        """Aliases and service records; models are entered by whoever serves them."""
        ours = (self._keys.aliases, self._keys.services)
        return [key for key in await self.read() if f"{self._keys.prefix}{key}".startswith(ours)]

    async def write(self, values: dict[str, bytes]) -> None:
        """Enter keys, over those that are there."""
        for key, value in values.items():
            await self._client.put(self._keys.prefix + key, value)

    async def clear(self) -> None:
        """Delete aliases and service records."""
        for key in await self.operator_keys():
            await self._client.delete(self._keys.prefix + key)
