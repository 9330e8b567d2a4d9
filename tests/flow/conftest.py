"""Settings of the flow tests' clusters: short waits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.crews import cluster, crew, shared_crew

__all__ = ["cluster", "crew", "shared_crew"]

SETTINGS: dict[str, Any] = {"ACK_WAIT_S": "2", "WORKER_LEASE_S": "2", "WORKER_HEALTH_INTERVAL_S": "1"}


@pytest.fixture(scope="module")
def cluster_settings() -> dict[str, str]:
    return SETTINGS
