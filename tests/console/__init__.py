"""The console, driven in a real Chromium against a real Nexus."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(*(f"tests.console.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py")))
