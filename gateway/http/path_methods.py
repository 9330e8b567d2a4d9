"""Return the methods that a path takes, for `Allow`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any


class AllowedMethods:
    """The methods of every route of an application."""

    def __init__(self, routes: Iterable[Any]) -> None:
        """`routes`: of FastAPI, with routers that were included."""
        self._exact: dict[str, set[str]] = {}
        self._patterns: list[tuple[re.Pattern[str], set[str]]] = []
        for route in _flat(routes):
            if "{" in route.path:
                self._patterns.append((route.path_regex, set(route.methods)))
            else:
                self._exact.setdefault(route.path, set()).update(route.methods)

    def declared(self, path: str) -> set[str]:
        """Return the methods of the routes at `path`, without HEAD and OPTIONS, which are implied."""
        methods = self._exact.get(path)
        if methods is None:
            methods = set().union(*(methods for pattern, methods in self._patterns if pattern.match(path)))
        return methods

    def allow_header(self, path: str) -> bytes:
        """Return the value of `Allow`; empty: nothing is there."""
        methods = self.declared(path)
        if not methods:
            return b""
        if "GET" in methods:
            methods = methods | {"HEAD"}
        return ", ".join(sorted(methods | {"OPTIONS"})).encode()


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from _flat(included.routes)
        else:
            yield route
