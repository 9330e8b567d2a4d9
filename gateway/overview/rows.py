"""Make the rows of the overview, one for each model. Pure: no clock, no bus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backbone.bus.bus import Queue, QueueDepth
from gateway.model_catalog import MANAGEMENT
from gateway.overview.traffic import NO_TRAFFIC, TOKEN_WINDOW_S, Traffic
from schemas.jobs import LANES, Capability, Lane
from schemas.presence import RegistrySnapshot, WorkerPresence, WorkerState

Row = dict[str, Any]

READY, PAUSED, ON_HOLD, UNHEALTHY, UNSERVED = "ready", "paused", "held", "unhealthy", "unserved"
AHEAD_OF_DEFAULT = (Lane.PRIORITY, Lane.DEFAULT)
"""The lanes whose jobs start before a new job of the default lane."""


@dataclass(frozen=True, slots=True)
class OverviewInputs:
    """What the rows are made of."""

    snapshot: RegistrySnapshot
    depths: list[QueueDepth]
    oldest: Mapping[Queue, int] = field(default_factory=dict)
    """When the job was stored that has waited longest in a queue, in Unix seconds."""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    service_s: Mapping[str, float] = field(default_factory=dict)
    """What the durable jobs of a model took lately, in seconds of a slot."""
    dead_letters: Mapping[str, int] = field(default_factory=dict)
    is_paused: Callable[[str], bool] = lambda _: False
    """Whether all servers of a model asked to wait."""


@dataclass(slots=True)
class _ModelState:
    """What is known of one model, while its row is made."""

    capabilities: set[Capability] = field(default_factory=set)
    workers: list[WorkerPresence] = field(default_factory=list)
    loads: list[bool | None] = field(default_factory=list)
    """Whether each ready worker's server has the model in memory."""
    loading: bool = False
    waiting: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(LANES, 0))
    running: int = 0
    oldest: int | None = None


def make_rows(inputs: OverviewInputs) -> dict[str, Row]:
    """Return a row for each model that a worker serves, or that has jobs or dead letters, sorted by name."""
    models = _collect(inputs)
    return {name: _row(name, models[name], inputs) for name in sorted(models)}


def _collect(inputs: OverviewInputs) -> dict[str, _ModelState]:
    models: dict[str, _ModelState] = {}
    for worker in inputs.snapshot.workers.values():
        for offer in worker.models:
            if capabilities := set(offer.capabilities) - MANAGEMENT:
                model = models.setdefault(offer.name, _ModelState())
                model.capabilities |= capabilities
                model.workers.append(worker)
                if worker.state is WorkerState.READY:
                    model.loads.append(offer.loaded)
                    model.loading |= offer.loading
    for depth in inputs.depths:
        if depth.queue.capability in MANAGEMENT:
            continue
        model = models.setdefault(depth.queue.model, _ModelState())
        model.capabilities.add(depth.queue.capability)
        model.waiting[depth.queue.lane] += depth.waiting
        model.running += depth.in_progress
        if depth.waiting and (at := inputs.oldest.get(depth.queue)) is not None:
            model.oldest = at if model.oldest is None else min(model.oldest, at)
    for name in (*inputs.dead_letters, *inputs.snapshot.holds):
        models.setdefault(name, _ModelState())
    return models


def _row(name: str, model: _ModelState, inputs: OverviewInputs) -> Row:
    ready = [worker for worker in model.workers if worker.state is WorkerState.READY]
    slots = sum(worker.slots for worker in ready)
    traffic = inputs.traffic.get(name, NO_TRAFFIC)
    return {
        "model": name,
        "state": _state(name, model, ready, inputs),
        "capabilities": sorted(capability.value for capability in model.capabilities),
        "waiting": {lane.value: count for lane, count in model.waiting.items()},
        "running": model.running,
        "slots": slots,
        "oldest_queued_at": model.oldest,
        "eta_seconds": None
        if name in inputs.snapshot.holds
        else _eta_s(model, slots, inputs.service_s.get(name) or _mean_s(traffic)),
        "tokens_per_second": round(traffic.tokens / TOKEN_WINDOW_S, 2),
        "errors": traffic.errors,
        "dead_letters": inputs.dead_letters.get(name, 0),
        "workers": len(ready),
        "loaded": _loaded(model.loads),
        "loading": model.loading,
    }


def _state(name: str, model: _ModelState, ready: list[WorkerPresence], inputs: OverviewInputs) -> str:
    if name in inputs.snapshot.holds:
        return ON_HOLD
    if ready:
        return PAUSED if inputs.is_paused(name) else READY
    return UNHEALTHY if any(worker.state is WorkerState.UNHEALTHY for worker in model.workers) else UNSERVED


def _loaded(loads: list[bool | None]) -> bool | None:
    known = [one for one in loads if one is not None]
    return any(known) if known else None


def _mean_s(traffic: Traffic) -> float | None:
    """Return what an answer takes on a worker, from requests; None: there were none lately."""
    return max(0.0, traffic.seconds / traffic.answers) if traffic.answers else None


def _eta_s(model: _ModelState, slots: int, service_s: float | None) -> float | None:
    """Return the seconds until a new job of the default lane ends; None: unknown."""
    if not slots or service_s is None:
        return None
    ahead = sum(model.waiting[lane] for lane in AHEAD_OF_DEFAULT)
    rounds = ahead // slots + (2 if ahead or model.running >= slots else 1)
    return round(service_s * rounds, 1)
