"""Say what needs an operator's attention, and what to do about it. Pure: no clock, no bus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backbone.bus.bus import StorageUsage
from gateway.health import Readiness
from gateway.overview.rows import UNHEALTHY, Row
from schemas.presence import RegistrySnapshot, WorkerState

Item = dict[str, Any]

CRITICAL, WARNING = "critical", "warning"
FULL_SHARE = 0.8
"""A stream that is this full needs attention."""
CRITICAL_SHARE = 0.95
MAX_ITEMS_PER_KIND = 50
SERVERS = {
    "nats": ("NATS", "Requests and jobs fail until it is back. Check the nats-server, and NATS_URL."),
    "nats_write": ("NATS", "It stores nothing. Check its disk and its JetStream limits."),
    "etcd": ("etcd", "Known workers go on serving; new ones are not seen. Check etcd, and ETCD_URL."),
    "redis": ("Redis", "Jobs can be neither submitted nor polled; requests go on. Check Redis, and REDIS_URL."),
    "redis_write": ("Redis", "It stores nothing. Check its memory limit and its disk."),
    "registry": ("etcd", "Its workers and models have not been read yet. Check etcd, and ETCD_URL."),
    "clock": ("The clock of this gateway's host", "Synchronize it with NTP."),
}
LEDGER = ("The ledger's database", "Usage and audit events wait in the journal. Check the database, and LEDGER_URL.")
STREAM_SETTINGS = {
    "NEXUS_JOBS": "MAX_QUEUE_BYTES",
    "NEXUS_BACKLOG": "MAX_QUEUE_BYTES",
    "NEXUS_EVENTS": "MAX_EVENT_BYTES",
    "NEXUS_DONE": "MAX_RESULT_BYTES",
    "NEXUS_USAGE": "MAX_USAGE_BYTES",
    "NEXUS_AUDIT": "MAX_AUDIT_BYTES",
    "OBJ_nexus-blobs": "MAX_BLOB_BYTES",
}


def attention(
    rows: Mapping[str, Row],
    snapshot: RegistrySnapshot,
    *,
    readiness: Readiness | None,
    storage: StorageUsage | None,
    connected: bool,
    ledger_lag_s: float = 0.0,
) -> list[Item]:
    """Return what needs attention, the most urgent first. `connected`: to NATS. `ledger_lag_s`: 0 where nothing is late."""
    kinds = (
        _servers(readiness, ledger_lag_s, connected=connected),
        _unserved(rows),
        _holds(rows, snapshot),
        _dead_letters(rows),
        _streams(storage),
        _workers(snapshot),
    )
    items = [item for kind in kinds for item in _first(kind)]
    return sorted(items, key=lambda item: item["severity"] != CRITICAL)


def _first(items: Iterator[Item]) -> list[Item]:
    """Return as many items as one kind may have."""
    return [item for _, item in zip(range(MAX_ITEMS_PER_KIND), items, strict=False)]


def _servers(readiness: Readiness | None, ledger_lag_s: float, *, connected: bool) -> Iterator[Item]:
    away = {} if readiness is None else {name: part for name, part in readiness.parts.items() if not part.ok}
    if not connected and "nats" not in away:
        yield _item("server_away", CRITICAL, "nats", "NATS does not answer.", SERVERS["nats"][1])
    for name, part in away.items():
        title, advice = SERVERS.get(name, (name, "Check the server."))
        reason = f": {part.error}" if part.error else ""
        yield _item("server_away", CRITICAL, name, f"{title} does not answer properly{reason}.", advice)
    if ledger_lag_s:
        title, advice = LEDGER
        yield _item(
            "server_away", WARNING, "ledger", f"{title} has not accepted events for {ledger_lag_s:.0f} s.", advice
        )


def _unserved(rows: Mapping[str, Row]) -> Iterator[Item]:
    for name, row in rows.items():
        waiting = sum(row["waiting"].values())
        if waiting and not row["workers"]:
            reason = "its workers are unhealthy" if row["state"] == UNHEALTHY else "no worker serves it"
            yield _item(
                "jobs_without_worker",
                CRITICAL,
                name,
                f"{waiting} {_jobs(waiting)} for '{name}', and {reason}.",
                f"Start a worker for it (`nexus worker --model {name}`), or cancel the jobs.",
                count=waiting,
            )


def _holds(rows: Mapping[str, Row], snapshot: RegistrySnapshot) -> Iterator[Item]:
    for name, hold in sorted(snapshot.holds.items()):
        waiting = sum(rows[name]["waiting"].values()) if name in rows else 0
        reason = f" ({hold.reason})" if hold.reason else ""
        yield _item(
            "queue_held",
            WARNING,
            name,
            f"An operator holds the queue of '{name}'{reason}; {waiting} {_jobs(waiting)}.",
            "Release it when its jobs may start.",
            count=waiting,
        )


def _dead_letters(rows: Mapping[str, Row]) -> Iterator[Item]:
    for name, row in rows.items():
        if count := row["dead_letters"]:
            yield _item(
                "dead_letters",
                WARNING,
                name,
                f"{count} {'job' if count == 1 else 'jobs'} of '{name}' failed for good.",
                "Read why (`nexus dlq list`), mend the cause, and replay or delete them.",
                count=count,
            )


def _streams(storage: StorageUsage | None) -> Iterator[Item]:
    for stream in () if storage is None else storage.streams:
        share = stream.bytes / stream.max_bytes if stream.max_bytes else 0.0
        if share >= FULL_SHARE:
            setting = STREAM_SETTINGS.get(stream.stream)
            advice = f"Raise {setting}, or let its jobs end." if setting else "Raise its limit in NATS."
            yield _item(
                "stream_full",
                CRITICAL if share >= CRITICAL_SHARE else WARNING,
                stream.stream,
                f"The stream {stream.stream} is {share:.0%} full.",
                advice,
            )


def _workers(snapshot: RegistrySnapshot) -> Iterator[Item]:
    for worker in sorted(snapshot.workers.values(), key=lambda one: one.id):
        if worker.state is WorkerState.UNHEALTHY:
            problem = worker.problems[0] if worker.problems else "its backend does not answer"
            yield _item(
                "worker_unhealthy",
                WARNING,
                worker.id,
                f"The worker '{worker.id}' on {worker.host} takes no jobs: {problem}",
                f"Check its {worker.backend} server.",
            )


def _item(kind: str, severity: str, subject: str, message: str, action: str, *, count: int | None = None) -> Item:
    return {
        "kind": kind,
        "severity": severity,
        "subject": subject,
        "message": message,
        "action": action,
        "count": count,
    }


def _jobs(count: int) -> str:
    return "job waits" if count == 1 else "jobs wait"
