"""Keeps libraries from loading optional libraries of theirs that Nexus does not use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hide_library(name: str) -> Iterator[None]:
    """Let imports in the block find a library as if it were not installed. It can be imported afterwards."""
    loaded = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if loaded is not None:
            sys.modules[name] = loaded
