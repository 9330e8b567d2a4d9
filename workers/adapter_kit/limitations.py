"""Features that a server lacks, learned only from the worker's own probes.

A caller's refused request proves nothing about the server: the error may repeat the caller's fields and texts. An adapter
that suspects a missing feature calls `confirm` with a probe, a tiny and harmless request with and without the feature.
The following MUST hold:

- A probe returns True only when the server refused the request with the feature and accepted it without.
- One probe at a time runs for a model and feature; callers with the same suspicion share its result.
- A result counts for one model and feature, and expires: after `RESULT_TTL_S`, or after `INCONCLUSIVE_TTL_S` where the probe
  proved nothing.
- At most `MAX_PROBES` begin within `PROBE_WINDOW_S`. `confirm` returns False where no further probe may begin.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from schemas.presence import Limitation
from workers.backends.base import BackendError

RESULT_TTL_S = 600.0
"""How long the result of a probe counts: a server may be updated."""
INCONCLUSIVE_TTL_S = 60.0
"""The pause after a probe that proved nothing."""
PROBE_TIMEOUT_S = 20.0
MAX_PROBES = 30
PROBE_WINDOW_S = 60.0

Key = tuple[str, str]
"""A model and a feature."""
Probe = Callable[[], Awaitable[bool | None]]
"""Returns True where the feature is missing, False where the server has it, None where the probe proved nothing."""


@dataclass(frozen=True, slots=True)
class _ProbeResult:
    """The result of one probe."""

    lacks: bool
    expires_at: float
    limitation: Limitation


class ModelLimitations:
    """Knows which features the models of one server lack. One per connection to a server; close it with the adapter."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._results: dict[Key, _ProbeResult] = {}
        self._declared: frozenset[Key] = frozenset()
        self._probes: dict[Key, asyncio.Task[bool]] = {}
        self._started_at: deque[float] = deque()

    def declare(self, lacking: Iterable[Key]) -> None:
        """Replace the limitations that the server itself declares."""
        self._declared = frozenset(lacking)

    def lacks(self, model: str, feature: str) -> bool:
        """Return whether the model is known to lack the feature now."""
        if self.is_empty:
            return False
        return (model, feature) in self._declared or self._known_result((model, feature)) is True

    async def confirm(self, model: str, feature: str, probe: Probe) -> bool:
        """Return whether the model lacks the feature, by a result that still counts or by `probe`. Never raises BackendError.

        A caller that is cancelled leaves the probe to the others; the probe ends within `PROBE_TIMEOUT_S`.
        """
        key = (model, feature)
        if key in self._declared:
            return True
        known = self._known_result(key)
        if known is not None:
            return known
        running = self._probes.get(key)
        if running is None:
            if not self._may_start():
                return False
            running = self._probes[key] = asyncio.create_task(self._run_probe(key, probe))
        return await asyncio.shield(running)

    def suspect(self, model: str, feature: str, probe: Probe) -> None:
        """Start `probe` without waiting for it, unless a result counts or such a probe runs already."""
        key = (model, feature)
        if (
            key not in self._declared
            and self._known_result(key) is None
            and key not in self._probes
            and self._may_start()
        ):
            self._probes[key] = asyncio.create_task(self._run_probe(key, probe))

    def confirmed_limitations(self) -> tuple[Limitation, ...]:
        """Return the limitations that probes have confirmed and that have not expired, for the operator."""
        if not self._results:
            return ()
        now = self._now()
        counting = (one for _, one in sorted(self._results.items()) if one.lacks and one.expires_at > now)
        return tuple(one.limitation for one in counting)

    @property
    def is_empty(self) -> bool:
        """Whether no limitation is known; cheap."""
        return not self._results and not self._declared

    async def close(self) -> None:
        """Cancel the probes that run."""
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _known_result(self, key: Key) -> bool | None:
        finding = self._results.get(key)
        if finding is None:
            return None
        if finding.expires_at <= self._now():
            del self._results[key]
            return None
        return finding.lacks

    def _may_start(self) -> bool:
        now = self._now()
        while self._started_at and self._started_at[0] <= now - PROBE_WINDOW_S:
            self._started_at.popleft()
        if len(self._started_at) >= MAX_PROBES:
            return False
        self._started_at.append(now)
        # The rate limit bounds how many results count at once; expired ones are removed here.
        self._results = {key: one for key, one in self._results.items() if one.expires_at > now}
        return True

    async def _run_probe(self, key: Key, probe: Probe) -> bool:
        lacks: bool | None = None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                lacks = await probe()
        except (BackendError, TimeoutError):
            pass
        finally:
            del self._probes[key]
        ttl_s, clock = INCONCLUSIVE_TTL_S if lacks is None else RESULT_TTL_S, int(time.time())
        limitation = Limitation(model=key[0], feature=key[1], since=clock, until=clock + int(ttl_s))
        self._results[key] = _ProbeResult(lacks is True, self._now() + ttl_s, limitation)
        return lacks is True
