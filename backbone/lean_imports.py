"""Imports a program without the optional libraries that its libraries load for features that Nexus does not use."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

HIDDEN = "rich"
"""structlog draws tracebacks with it on a terminal. `backbone.terminal_log` writes them here."""
DEFERRED = "aiohttp"
"""nats-py connects to `ws://` and `wss://` with it."""


class _DeferringFinder(MetaPathFinder):
    """Finds `DEFERRED` as a module whose code runs when an attribute is first read, not when the module is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Make the imports in the block cheaper. A process does so once, where it imports its program (ADR 0062).

    In the block, `HIDDEN` seems not to be installed, and `DEFERRED` is loaded on first use, which may be later. Neither holds for a
    library that is imported already. The garbage collector pauses, and never looks at what exists at the end of the block again.
    """
    finder = _DeferringFinder()
    sys.meta_path.insert(0, finder)
    hides = HIDDEN not in sys.modules
    if hides:
        sys.modules[HIDDEN] = None  # type: ignore[assignment] # the import system's way to say that a module does not exist
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if hides:
            del sys.modules[HIDDEN]
        sys.meta_path.remove(finder)
