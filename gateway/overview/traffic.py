"""What each model has done lately, over all gateways.

Each gateway reports what its own counters show, every few seconds, and every second while somebody follows the overview of any
gateway. A report replaces the gateway's last one, so that a lost report is made up for by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

import orjson
import structlog

from backbone.bus.bus import GatewayBus
from backbone.ids import new_token
from gateway.metrics import ModelTotals

log = structlog.get_logger(__name__)

TOPIC = "traffic"
REPORT_INTERVAL_S = 5.0
FOLLOWED_INTERVAL_S = 1.0
FOLLOWED_FOR_S = 3.0
"""For this time after a report that says so, the overview counts as followed."""
TOKEN_WINDOW_S = 60.0
ERROR_WINDOW_S = 300.0
PEER_TIMEOUT_S = 12.0
"""A gateway that has not reported for this time has stopped."""
MAX_MODELS = 2000
"""Models in a report: those with the most answers and errors."""
MAX_PEERS = 256


class Traffic(NamedTuple):
    """What one model has done lately."""

    tokens: int = 0
    """Completion tokens of answers that ended in the last minute."""
    errors: int = 0
    """Failed requests and jobs of the last five minutes."""
    answers: int = 0
    """Requests that were answered in the last five minutes."""
    seconds: float = 0.0
    """Seconds on a worker that these answers took."""

    def plus(self, other: Traffic) -> Traffic:
        """Return the sum."""
        return Traffic(
            self.tokens + other.tokens,
            self.errors + other.errors,
            self.answers + other.answers,
            self.seconds + other.seconds,
        )

    def since(self, earlier: Traffic) -> Traffic:
        """Return the difference."""
        return Traffic(
            self.tokens - earlier.tokens,
            self.errors - earlier.errors,
            self.answers - earlier.answers,
            self.seconds - earlier.seconds,
        )


NO_TRAFFIC = Traffic()


@dataclass(slots=True)
class _Sample:
    """What was counted of each model until one moment, since the sample before."""

    at: float
    changes: dict[str, Traffic]


@dataclass(slots=True)
class TrafficHistory:
    """Turns counters that only grow into what was counted lately."""

    _last: dict[str, Traffic] = field(default_factory=dict)
    _samples: deque[_Sample] = field(default_factory=deque)

    def add(self, totals: Mapping[str, ModelTotals], now: float) -> None:
        """Note what the counters show at `now`, in monotonic seconds."""
        changes = {}
        for model, total in totals.items():
            reading = Traffic(total.tokens, total.errors, total.answers, total.seconds)
            before = self._last.get(model, NO_TRAFFIC)
            if reading != before:
                self._last[model] = reading
                changes[model] = reading.since(before)
        if changes:
            self._samples.append(_Sample(now, changes))
        while self._samples and self._samples[0].at <= now - ERROR_WINDOW_S:
            self._samples.popleft()

    def recent(self, now: float) -> dict[str, Traffic]:
        """Return what each model has done lately, for those that have done anything."""
        found: dict[str, Traffic] = {}
        for sample in self._samples:
            counts_tokens = sample.at > now - TOKEN_WINDOW_S
            for model, change in sample.changes.items():
                counted = change if counts_tokens else change._replace(tokens=0)
                found[model] = found.get(model, NO_TRAFFIC).plus(counted)
        return found


class TrafficExchange:
    """Reports this gateway's traffic to the others, and adds up what they report."""

    def __init__(self, bus: GatewayBus, totals: Callable[[], Mapping[str, ModelTotals]]) -> None:
        """`totals` reads this process's counters."""
        self._bus = bus
        self._totals = totals
        self._name = new_token()
        self._history = TrafficHistory()
        self._peers: dict[str, tuple[float, dict[str, Traffic]]] = {}
        self._followed_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.follows = False
        """Set while somebody follows the overview of this gateway."""

    async def start(self) -> None:
        """Receive reports, and send them. Raises Unavailable."""
        await self._bus.subscribe_gateways(TOPIC, self._on_report)
        self._task = asyncio.create_task(self._report_forever())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def begin_following(self) -> None:
        """Let every gateway report each second from now on, until `follows` is reset."""
        self.follows = True
        self._wake.set()

    def recent(self) -> dict[str, Traffic]:
        """Return what each model has done lately, over all gateways."""
        oldest = monotonic() - PEER_TIMEOUT_S
        self._peers = {name: peer for name, peer in self._peers.items() if peer[0] >= oldest}
        found = self._history.recent(monotonic())
        for _, models in self._peers.values():
            for model, traffic in models.items():
                found[model] = found.get(model, NO_TRAFFIC).plus(traffic)
        return found

    @property
    def gateways(self) -> int:
        """The number of gateway processes that have reported lately, this one included."""
        oldest = monotonic() - PEER_TIMEOUT_S
        return 1 + sum(seen_at >= oldest for seen_at, _ in self._peers.values())

    async def _report_forever(self) -> None:
        while True:
            try:
                self._report()
            except Exception:
                log.exception("traffic.report_crashed")
            followed = self.follows or monotonic() < self._followed_until
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOWED_INTERVAL_S if followed else REPORT_INTERVAL_S):
                    await self._wake.wait()

    def _report(self) -> None:
        now = monotonic()
        self._history.add(self._totals(), now)
        recent = self._history.recent(now)
        if len(recent) > MAX_MODELS:
            busiest = sorted(recent, key=lambda model: recent[model].answers + recent[model].errors, reverse=True)
            recent = {model: recent[model] for model in busiest[:MAX_MODELS]}
        models = {model: [*traffic] for model, traffic in recent.items()}
        self._bus.send_to_gateways(
            TOPIC, orjson.dumps({"gateway": self._name, "follows": self.follows, "models": models})
        )

    def _on_report(self, data: bytes) -> None:
        try:
            report = orjson.loads(data)
            name = str(report["gateway"])
            models = {str(model): _parse(values) for model, values in list(report["models"].items())[:MAX_MODELS]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("traffic.report_unreadable", error=str(error))
            return
        if name == self._name or (name not in self._peers and len(self._peers) >= MAX_PEERS):
            return
        self._peers[name] = monotonic(), models
        if report.get("follows"):
            was_followed = monotonic() < self._followed_until
            self._followed_until = monotonic() + FOLLOWED_FOR_S
            if not was_followed:
                self._wake.set()


def _parse(values: list[float]) -> Traffic:
    tokens, errors, answers, seconds = values
    return Traffic(int(tokens), int(errors), int(answers), float(seconds))
