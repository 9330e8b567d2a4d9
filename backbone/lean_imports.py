"""Imports a program without the optional libraries that its libraries load for features that Nexus does not use."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

HIDDEN = ("rich", "opentelemetry.sdk")
"""structlog draws tracebacks with rich on a terminal; `backbone.terminal_log` writes them here. redis would count its calls with
OpenTelemetry's SDK; `backbone.tracing` imports it where tracing is on.
"""
DEFERRED = "aiohttp"
"""nats-py connects to `ws://` and `wss://` with it."""


class _Deferred(ModuleType):
    """Stands for a module that is imported when an attribute is first read."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # the import system looks at these, and must not import anything by that
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Make the imports in the block cheaper. A process does so once, where it imports its program (ADR 0062).

    In the block, `HIDDEN` seems not to be installed, and what imports `DEFERRED` gets a stand-in, which imports it on first use. Neither
    holds for a library that is imported already, or behind the block. The garbage collector pauses, and never looks at what exists at the end of the block again.
    """
    # None is the import system's way to say that a module does not exist.
    stand_ins: dict[str, Any] = {**dict.fromkeys(HIDDEN), DEFERRED: _Deferred(DEFERRED)}
    stand_ins = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(stand_ins)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name, module in stand_ins.items():
            if sys.modules.get(name, ...) is module:
                del sys.modules[name]
