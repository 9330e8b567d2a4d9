"""Aliases, service records and holds of `nexus up`, saved across starts: its etcd begins empty each time.

A file of the data directory stores them. At the start, records that etcd lacks are written into it. From then on each
change in etcd is saved in the file a moment later. An etcd that restarted with its data is right, and the file follows;
one that lost its data is given the records of the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from backbone.registry.keys import RegistryKeys
from cli.embedded.etcd_api import ETCD_ERRORS, EtcdApi, EtcdApiLogin, KeyListing
from cli.stack.data_dir import DataDir

SAVE_AFTER_S = 0.05
"""Changes within this time are saved together."""
SAVE_RETRY_S = 5.0
RECONNECT_DELAY_S = 0.2
SEED_TIMEOUT_S = 5.0


class EtcdSeeder:
    """Seeds etcd from the file, and saves etcd's changes in it. Raises ConsoleError at once if the file cannot be read."""

    def __init__(self, data: DataDir, prefix: str, notify: Callable[[str], None]) -> None:
        self._data = data
        self._notify = notify
        keys = RegistryKeys(prefix)
        self._kinds = {"aliases": keys.aliases, "holds": keys.holds, "services": keys.services}
        # This range holds these prefixes and the model catalog between them, but not the workers, which write often.
        self._range = (keys.aliases, keys.services[:-1] + chr(ord("/") + 1))
        self._records = self._by_key(data.operator_data())
        self._saved = dict(self._records)
        self._cluster = ""
        self._revision = 0
        self._seeded = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, url: str, login: EtcdApiLogin | None = None) -> None:
        """Seed the etcd at `url`, and follow its changes from now on."""
        self._task = asyncio.create_task(self._follow_forever(url, login), name="etcd-seeder")
        try:
            async with asyncio.timeout(SEED_TIMEOUT_S):
                await self._seeded.wait()
        except TimeoutError:
            self._notify("etcd does not accept the aliases and services yet; they are written once it does")

    async def stop(self) -> None:
        """Stop following etcd, and save what is not saved yet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._save()
        self._cancel_timer()

    async def _follow_forever(self, url: str, login: EtcdApiLogin | None) -> None:
        etcd = EtcdApi(url, *self._range, login)
        async with contextlib.aclosing(etcd):
            while True:
                with contextlib.suppress(*ETCD_ERRORS):
                    await self._follow(etcd)
                await asyncio.sleep(RECONNECT_DELAY_S)

    async def _follow(self, etcd: EtcdApi) -> None:
        found = await etcd.list()
        await self._merge(etcd, found)
        self._seeded.set()
        self._save_soon()
        async with contextlib.aclosing(etcd.watch(found.revision + 1)) as batches:
            async for changes in batches:
                for key, value in changes.values.items():
                    self._update(key, value)
                self._revision = changes.revision
                self._save_soon()

    async def _merge(self, etcd: EtcdApi, found: KeyListing) -> None:
        """Write missing records into etcd, and take over those that etcd has."""
        lost_nothing = found.cluster == self._cluster and found.revision >= self._revision
        missing = {} if lost_nothing else {key: v for key, v in self._records.items() if key not in found.values}
        for key, value in missing.items():
            await etcd.put(key, json.dumps(value, ensure_ascii=False).encode())
        self._records = missing
        for key, value in found.values.items():
            self._update(key, value)
        self._cluster, self._revision = found.cluster, found.revision

    def _update(self, key: str, value: bytes | None) -> None:
        """Take over the value of one key. A value that is not JSON is no record."""
        if not key.startswith(tuple(self._kinds.values())):
            return
        self._records.pop(key, None)
        if value is not None:
            with contextlib.suppress(ValueError):
                self._records[key] = json.loads(value)

    # File

    def _by_key(self, by_kind: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            self._kinds[kind] + name: value
            for kind, values in by_kind.items()
            if kind in self._kinds
            for name, value in values.items()
        }

    def _by_kind(self) -> dict[str, dict[str, Any]]:
        return {
            kind: {
                key.removeprefix(start): self._records[key] for key in sorted(self._records) if key.startswith(start)
            }
            for kind, start in self._kinds.items()
        }

    def _save_soon(self, after_s: float = SAVE_AFTER_S) -> None:
        if self._timer is None and self._records != self._saved:
            self._timer = asyncio.get_running_loop().call_later(after_s, self._save)

    def _save(self) -> None:
        self._cancel_timer()
        if self._records == self._saved:
            return
        try:
            self._data.save_operator_data(self._by_kind())
        except OSError as error:
            self._notify(
                f"aliases and services cannot be written to {self._data.operator_file}: {error.strerror}; trying again"
            )
            self._save_soon(SAVE_RETRY_S)
        else:
            self._saved = dict(self._records)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
