"""The workers by host, and the public status."""

from __future__ import annotations

import orjson
import pytest

from backbone.testing.registry import MemoryHub, MemoryRegistry
from gateway.overview import hosts as hosts_module
from gateway.overview.hosts import HostDirectory
from gateway.overview.public_status import PublicStatus
from schemas.presence import WorkerPresence


def presence(name: str, host: str = "gpu1") -> WorkerPresence:
    return WorkerPresence(id=name, backend="echo", host=host, slots=4, busy=1)


async def test_a_worker_that_vanished_is_shown_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host is gone once all of its workers are; one that comes back is as before."""
    clock = 1000.0
    monkeypatch.setattr(hosts_module, "now", lambda: clock)
    registry = MemoryRegistry(MemoryHub())
    await registry.start()
    directory = HostDirectory(registry)
    await directory.start()
    first, _ = await registry.announce(presence("a")), await registry.announce(presence("b"))
    [host] = directory.hosts()
    assert (host["slots"], host["busy"], host["gone_at"]) == (8, 2, None)
    await first.withdraw()
    [host] = directory.hosts()
    assert [(worker["id"], worker["gone_at"]) for worker in host["workers"]] == [("b", None), ("a", 1000)]
    assert (host["slots"], host["gone_at"]) == (4, None)
    again = await registry.announce(presence("a"))
    assert all(worker["gone_at"] is None for worker in directory.hosts()[0]["workers"])
    await again.withdraw()
    clock += hosts_module.REMEMBERED_S
    assert [worker["id"] for worker in directory.hosts()[0]["workers"]] == ["b"]
    await directory.close()


class _Overview:
    """An overview with these rows."""

    def __init__(self, *rows: tuple[str, float | None]) -> None:
        self.stale_since: float | None = None
        self.rows = [
            {"model": f"m{number}", "state": state, "loaded": None, "eta_seconds": eta}
            for number, (state, eta) in enumerate(rows)
        ]

    async def read(self) -> dict[str, object]:
        return {"at": 1.0, "stale_since": self.stale_since, "models": self.rows}


@pytest.mark.parametrize(
    ("rows", "state", "waits"),
    [
        ([("ready", 3.0), ("ready", 299.0)], "up", ["short", "minutes"]),
        ([("ready", 301.0), ("held", None)], "degraded", ["long", None]),
        ([("unhealthy", None)], "down", [None]),
        ([("unserved", None)], "up", []),
    ],
)
async def test_the_public_status_says_little(
    rows: list[tuple[str, float | None]], state: str, waits: list[str | None]
) -> None:
    """Steps in place of figures, and no model that nobody serves."""
    found = orjson.loads(await PublicStatus(_Overview(*rows)).text())  # type: ignore[arg-type]
    assert (found["state"], [model["expected_wait"] for model in found["models"]]) == (state, waits)
    assert all(set(model) == {"model", "state", "is_loaded", "expected_wait"} for model in found["models"])
