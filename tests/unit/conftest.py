"""What tests of single parts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.cli import gateway_double


@pytest.fixture(autouse=True)
def gateway_doubles() -> Iterator[None]:
    """Whatever gateway a test starts ends with it."""
    yield
    gateway_double.close_all()
