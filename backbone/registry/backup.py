"""Backup of the keys in etcd that have no lease: aliases, service records, holds and the model catalog."""

from __future__ import annotations

from backbone.registry.etcd_client import EtcdClient
from backbone.registry.keys import RegistryKeys


class RegistryBackup:
    """Reads and writes keys under one prefix; key names here come without the prefix. Raises Unavailable. The caller opens and
    closes the client.
    """

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client = client
        self._keys = RegistryKeys(prefix)

    async def list_workers(self) -> list[str]:
        """Return the keys of live workers."""
        entries, _ = await self._client.list_prefix(self._keys.workers)
        return [entry.key.removeprefix(self._keys.workers) for entry in entries]

    async def read(self) -> dict[str, bytes]:
        """Return all keys without a lease."""
        entries, _ = await self._client.list_prefix(self._keys.prefix)
        return {entry.key.removeprefix(self._keys.prefix): entry.value for entry in entries if not entry.lease}

    async def operator_keys(self) -> list[str]:
        """Return the keys of aliases, service records and holds; workers write the models themselves."""
        ours = (self._keys.aliases, self._keys.services, self._keys.holds)
        return [key for key in await self.read() if f"{self._keys.prefix}{key}".startswith(ours)]

    async def write(self, values: dict[str, bytes]) -> None:
        """Write keys; existing ones are replaced."""
        for key, value in values.items():
            await self._client.put(self._keys.prefix + key, value)

    async def clear(self) -> None:
        """Delete aliases, service records and holds."""
        for key in await self.operator_keys():
            await self._client.delete(self._keys.prefix + key)
