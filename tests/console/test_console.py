"""All tests of the console in one module, so that they share one Nexus and one browser: each file of this folder holds those of a screen."""

from importlib import import_module
from pathlib import Path

import pytest

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if path.stem not in {"browser", "conftest", "site", "test_console"}:
        module = import_module(f"tests.console.{path.stem}")
        globals().update({name: tests for name, tests in vars(module).items() if name.startswith("Test")})
