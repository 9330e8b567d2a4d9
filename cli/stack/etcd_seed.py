"""Aliases and service records of `nexus up`: they outlive its etcd, which begins empty at each start.

They are kept in a file of the data directory. At the start, what etcd lacks is written into it; from then on etcd is
followed, and whoever changes it, the file has it a moment later. An etcd that died and came back with its data has the
last word; one that lost them is given what it lacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from backbone.registry.keys import RegistryKeys
from cli.embedded.etcd_api import ETCD_ERRORS, EtcdApi, EtcdLogin, KeyListing
from cli.stack.data_dir import DataDir

SAVE_AFTER_S = 0.05
"""Changes in this time are written together."""
SAVE_AGAIN_S = 5.0
RETRY_S = 0.2
SEED_S = 5.0


class EtcdSeeder:
    """Keeps the file and etcd the same. Raises ConsoleError at once when the file cannot be read."""

    def __init__(self, data: DataDir, prefix: str, notify: Callable[[str], None]) -> None:
        self._data = data
        self._notify = notify
        keys = RegistryKeys(prefix)
        self._kinds = {"aliases": keys.aliases, "services": keys.services}
        # In the order of keys the two are neighbours but for the catalogue of models; workers, who write often, are not.
        self._range = (keys.aliases, keys.services[:-1] + chr(ord("/") + 1))
        self._kept = self._by_key(data.operator_data())
        self._saved = dict(self._kept)
        self._store = ""
        self._revision = 0
        self._seeded = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, url: str, login: EtcdLogin | None = None) -> None:
        """Fill the etcd at `url`, and follow it from now on."""
        self._task = asyncio.create_task(self._follow_forever(url, login), name="operator-data")
        try:
            async with asyncio.timeout(SEED_S):
                await self._seeded.wait()
        except TimeoutError:
            self._notify("etcd does not take the aliases and services yet; they follow when it does")

    async def stop(self) -> None:
        """Follow no more, and write what is not yet written."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._save()
        self._cancel_timer()

    async def _follow_forever(self, url: str, login: EtcdLogin | None) -> None:
        etcd = EtcdApi(url, *self._range, login)
        async with contextlib.aclosing(etcd):
            while True:
                with contextlib.suppress(*ETCD_ERRORS):
                    await self._follow(etcd)
                await asyncio.sleep(RETRY_S)

    async def _follow(self, etcd: EtcdApi) -> None:
        found = await etcd.listing()
        await self._agree(etcd, found)
        self._seeded.set()
        self._save_soon()
        async with contextlib.aclosing(etcd.watch(found.revision + 1)) as batches:
            async for changes in batches:
                for key, value in changes.values.items():
                    self._take(key, value)
                self._revision = changes.revision
                self._save_soon()

    async def _agree(self, etcd: EtcdApi, found: KeyListing) -> None:
        """Bring what is kept and what was found together."""
        lost_nothing = found.store == self._store and found.revision >= self._revision
        missing = {} if lost_nothing else {key: v for key, v in self._kept.items() if key not in found.values}
        for key, value in missing.items():
            await etcd.put(key, json.dumps(value, ensure_ascii=False).encode())
        self._kept = missing
        for key, value in found.values.items():
            self._take(key, value)
        self._store, self._revision = found.store, found.revision

    def _take(self, key: str, value: bytes | None) -> None:
        """One key, as it is now. A value that is no JSON is nobody's alias and nobody's service."""
        if not key.startswith(tuple(self._kinds.values())):
            return
        self._kept.pop(key, None)
        if value is not None:
            with contextlib.suppress(ValueError):
                self._kept[key] = json.loads(value)

    # The file

    def _by_key(self, by_kind: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {
            self._kinds[kind] + name: value
            for kind, values in by_kind.items()
            if kind in self._kinds
            for name, value in values.items()
        }

    def _by_kind(self) -> dict[str, dict[str, Any]]:
        return {
            kind: {key.removeprefix(start): self._kept[key] for key in sorted(self._kept) if key.startswith(start)}
            for kind, start in self._kinds.items()
        }

    def _save_soon(self, after_s: float = SAVE_AFTER_S) -> None:
        if self._timer is None and self._kept != self._saved:
            self._timer = asyncio.get_running_loop().call_later(after_s, self._save)

    def _save(self) -> None:
        self._cancel_timer()
        if self._kept == self._saved:
            return
        try:
            self._data.keep_operator_data(self._by_kind())
        except OSError as error:
            self._notify(f"aliases and services cannot be written to {self._data.operator_file}: {error.strerror}")
            self._save_soon(SAVE_AGAIN_S)
        else:
            self._saved = dict(self._kept)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
