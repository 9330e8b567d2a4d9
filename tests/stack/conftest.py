"""A stack for tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import run_sync
from tests.stack.test_up import Up


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One stack for the tests that do not change it."""
    up = Up(tmp_path_factory.mktemp("shared") / "nexus", "--no-local-models", start=True)
    run_sync(up.__aenter__())
    try:
        run_sync(up.is_up())
        yield up
    finally:
        run_sync(up.__aexit__())
