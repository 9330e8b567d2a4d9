"""A worker with thousands of models makes as many changes in etcd: the gateway keeps up with them."""

from __future__ import annotations

import time

import pytest

from backbone.registry.etcd import EtcdRegistry
from backbone.registry.etcd_client import KeyChange
from backbone.registry.keys import RegistryKeys
from schemas.jobs import Capability
from schemas.presence import CatalogEntry, RegistrySnapshot
from tests.conftest import Eventually

MODELS = 300
COST_S = 0.005


async def test_many_changes_are_published_together(eventually: Eventually, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change on its own is published at once; of many, the last one is soon seen, and most share a snapshot."""
    registry = EtcdRegistry("http://127.0.0.1:1", "/nexus/")
    publish, seen = registry._state.publish, list[RegistrySnapshot]()

    def slow() -> None:
        time.sleep(COST_S)
        publish()

    monkeypatch.setattr(registry._state, "publish", slow)
    registry.subscribe(seen.append)
    keys = RegistryKeys("/nexus/")
    for number in range(MODELS):
        entry = CatalogEntry(name=f"m{number}", capabilities=(Capability.CHAT,))
        registry._apply([KeyChange(keys.model(entry.name), entry.model_dump_json().encode(), number + 1)])
        if number == 0:
            assert [len(one.models) for one in seen] == [1]
    await eventually(lambda: len(seen[-1].models) == MODELS)
    assert len(seen) <= 3
    await registry.close()
