"""The public status: per model whether it is up, and about how long a job waits. No key, no figures, nothing of teams."""

from __future__ import annotations

import orjson

from gateway.cached_result import CachedResult
from gateway.overview.monitor import OverviewMonitor
from gateway.overview.rows import ON_HOLD, PAUSED, READY, UNSERVED, Row

MAX_AGE_S = 5.0
WAIT_STEPS = ((30.0, "short"), (300.0, "minutes"))
"""Seconds until a new job ends, and what that is called; above them it is `long`."""
STATES = {READY: "up", PAUSED: "paused", ON_HOLD: "paused"}
"""What callers are told; any other state is `down`."""


class PublicStatus:
    """Renders the status, at most every few seconds for all callers."""

    def __init__(self, overview: OverviewMonitor) -> None:
        self._overview = overview
        self._text = CachedResult(self._render, MAX_AGE_S)

    async def text(self) -> bytes:
        """Return the status as JSON. Raises Unavailable."""
        return await self._text.get()

    async def _render(self) -> bytes:
        frame = await self._overview.read()
        models = [_model(row) for row in frame["models"] if row["state"] != UNSERVED]
        is_down = frame["stale_since"] is not None
        states = {model["state"] for model in models}
        state = "down" if is_down or states == {"down"} else "degraded" if states - {"up"} else "up"
        return orjson.dumps({"object": "status", "at": int(frame["at"]), "state": state, "models": models})


def _model(row: Row) -> dict[str, str | bool | None]:
    return {
        "model": row["model"],
        "state": STATES.get(row["state"], "down"),
        "is_loaded": row["loaded"],
        "expected_wait": _wait(row["eta_seconds"]),
    }


def _wait(eta_s: float | None) -> str | None:
    if eta_s is None:
        return None
    return next((name for limit, name in WAIT_STEPS if eta_s <= limit), "long")
