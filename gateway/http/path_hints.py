"""Say what a caller may have meant by a path that is not there."""

from __future__ import annotations

from schemas.endpoints import SERVED

PREFIX = "/v1"
OPENAI_RESOURCES = frozenset({"batches", "files", "models", "responses", *(spec.path.split("/")[2] for spec in SERVED)})
"""First segments under `/v1` that clients call; a base URL without `/v1` makes them the first of all."""
OBSERVABILITY_PATHS = frozenset(("/docs", "/metrics", "/openapi.json"))


def path_hint(path: str) -> str:
    """Return what to do, to be put behind the message; empty where nothing is likely."""
    if path.startswith(f"{PREFIX}{PREFIX}/"):
        return f": the base URL of the client ends in {PREFIX} twice, or the client adds {PREFIX} itself"
    if path.split("/")[1:2] and path.split("/")[1] in OPENAI_RESOURCES:
        return f": the base URL of the client must end in {PREFIX}"
    if path in OBSERVABILITY_PATHS:
        return " on this port: it is on OBSERVABILITY_PORT, and here too where PUBLIC_ROUTES names it"
    return ""
