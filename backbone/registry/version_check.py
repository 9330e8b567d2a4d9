"""Whether the roles of an etcd hold: in older versions users get past them.

| advisory | lets | fixed in |
|---|---|---|
| GHSA-rfx7-8w68-q57q | any user read and write any key, in a transaction within a transaction | 3.5.28, 3.6.9 |
| GHSA-q8m4-xhhv-38mg | callers without a login list members, set alarms, grant leases, compact | 3.5.28, 3.6.9 |
| CVE-2026-44283 | any user read by `prev_kv`, and attach leases, in a transaction | 3.5.30, 3.6.11 |
| GHSA-xg4h-6gfc-h4m8 | whoever may read one key watch all keys behind it | 3.5.33, 3.6.14 |

deploy/etcd closes the first and the third in every version, since it refuses transactions (`max-txn-ops: 0`), and the second
to whoever has no certificate.
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
"""The first patch of each line in which roles hold; of later lines, every one; of earlier lines, none."""
ADVICE = "in this version users of etcd get past their permissions: upgrade etcd to 3.5.33, 3.6.14 or newer"
DENIED = "permission denied"
"""What versions from 3.5.28 to 3.5.31, and from 3.6.9 to 3.6.11, say to users who ask for the version."""


def is_vulnerable(version: str) -> bool:
    """Return whether roles do not hold in this version. One that cannot be read counts as one in which they do not."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        return True
    major, minor, patch = map(int, match.groups())
    line = (major, minor)
    return patch < FIXED[line] if line in FIXED else line < max(FIXED)


async def vulnerable_version(client: EtcdClient) -> str:
    """Return the version of the etcd that `link` talks to where its roles do not hold, else "". Raises Unavailable."""
    try:
        version = await client.version()
    except Unavailable as error:
        if DENIED not in str(error):
            raise
        return "3.5.28 to 3.5.31, or 3.6.9 to 3.6.11"
    return version if is_vulnerable(version) else ""


class VersionCheck:
    """Logs an error whenever an etcd with users is reached whose roles do not hold. For links with a login alone."""

    def __init__(self, client: EtcdClient) -> None:
        """Watch `link` for connections; nothing is asked before the first."""
        self._client = client
        self._tasks: set[asyncio.Task[None]] = set()
        self._reported = ""
        self._end = client.on_recovery(self._start)

    def _start(self) -> None:
        task = asyncio.create_task(self._check(), name="etcd-version")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self) -> None:
        with suppress(Unavailable):  # the next connection asks again
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
