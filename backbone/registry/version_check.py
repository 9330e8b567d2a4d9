"""Checks the version of etcd: in older versions users get past the permissions of their roles.

| advisory | effect | fixed in |
|---|---|---|
| GHSA-rfx7-8w68-q57q | any user reads and writes any key, in a transaction within a transaction | 3.5.28, 3.6.9 |
| GHSA-q8m4-xhhv-38mg | callers without a login list members, set alarms, grant leases and compact | 3.5.28, 3.6.9 |
| CVE-2026-44283 | any user reads by `prev_kv`, and attaches leases, in a transaction | 3.5.30, 3.6.11 |
| GHSA-xg4h-6gfc-h4m8 | a user with read permission for one key watches all keys behind it | 3.5.33, 3.6.14 |

deploy/etcd closes the first and the third in every version, since it refuses transactions (`max-txn-ops: 0`), and the second
for callers without a certificate.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

import structlog

from backbone.registry.etcd_client import EtcdClient
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

FIXED = {(3, 5): 33, (3, 6): 14}
"""The first patch of each release line in which roles hold; they hold in every later line and in no earlier one."""
ADVICE = "in this version users of etcd get past their permissions: upgrade etcd to 3.5.33, 3.6.14 or newer"
DENIED = "permission denied"
"""The answer of versions 3.5.28 to 3.5.31, and 3.6.9 to 3.6.11, to users who ask for the version."""


def is_vulnerable(version: str) -> bool:
    """Return whether roles do not hold in this version. An unreadable version counts as vulnerable."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        return True
    major, minor, patch = map(int, match.groups())
    line = (major, minor)
    return patch < FIXED[line] if line in FIXED else line < max(FIXED)


async def vulnerable_version(client: EtcdClient) -> str:
    """Return the version of etcd if its roles do not hold, else "". Raises Unavailable."""
    try:
        version = await client.version()
    except Unavailable as error:
        if DENIED not in str(error):
            raise
        return "3.5.28 to 3.5.31, or 3.6.9 to 3.6.11"
    return version if is_vulnerable(version) else ""


class VersionCheck:
    """Logs an error whenever the client reaches an etcd whose roles do not hold. Only for clients with a login."""

    def __init__(self, client: EtcdClient) -> None:
        """Watch `client` for connections; nothing is requested before the first."""
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported = ""
        self._end = client.on_recovery(self._start)

    def _start(self) -> None:
        task = asyncio.create_task(self._check(), name="etcd-version")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self) -> None:
        with suppress(Unavailable):  # the next connection checks again
            version = await vulnerable_version(self._client)
            if version and version != self._reported:
                log.error("registry.etcd_version_vulnerable", version=version, advice=ADVICE)
            self._reported = version

    async def close(self) -> None:
        """Stop watching."""
        self._end()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
