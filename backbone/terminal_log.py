"""Log lines for a person at a terminal: the time of day, a sentence, and problems in color.

Each event that matters to a person who starts a process by hand has a sentence here; others show their key and fields.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

SENTENCES = {
    "gateway.started": "The gateway is up: {url}/v1 (metrics, documentation and health on port {observability_port}).",
    "auth.bootstrap_key_missing": (
        "No {setting} is set: only API keys that were created before work. Set it, or GATEWAY_BEARER_TOKEN_FILE."
    ),
    "auth.bootstrap_key_created": "A new admin key is in {file}.",
    "gateway.shutdown_started": "Shutting down: new requests are accepted for {lame_duck_s:g} s more. Press Ctrl-C again to stop sooner.",
    "gateway.process_failed": "Gateway process {index} failed (exit code {code}); another one starts in 5 s.",
    "gateway.process_died": "Gateway process {index} died (exit code {code}); another one starts now.",
    "connections.bound_lowered": "MAX_CONNECTIONS is lowered to {max_connections}: {reason}.",
    "worker.serving": "Serving {models} with {slots} slots.",
    "worker.problems_solved": "All problems are solved.",
    "worker.problem_found": "Not served: {problem}.",
    "worker.model_name_rejected": "The model '{model}' is not served: {error}.",
    "worker.backend_unavailable": "The inference server cannot be used: {error}. The worker retries every few seconds.",
    "worker.model_paused": "The model '{model}' is paused for {seconds:g} s: {error}.",
    "worker.backend_lost": "The connection to the inference server is lost: {error}.",
    "worker.draining": "Stopping: {running} running jobs may finish.",
    "worker.drained": "Stopped.",
    "nats.disconnected": "The connection to NATS is lost. Reconnecting until NATS is back.",
    "nats.reconnected": "NATS is back.",
    "nats.access_refused": "{error}.",
    "nats.silent": "NATS does not answer any more. Trying its next server.",
    "nats.storage_failed": "NATS cannot store data: {error}.",
    "nats.storage_recovered": "NATS can store data again.",
    "etcd.unavailable": "{error}. Retrying until it answers; until then new workers are not found.",
    "registry.etcd_version_vulnerable": "etcd is {version}: {advice}.",
    "etcd.recovered": "etcd answers.",
    "registry.announce_failed": "The worker cannot be announced in etcd: {error}.",
    "registry.watch_unavailable": "The registry cannot be read: {error}.",
    "registry.lease_lost": "The worker's entry in etcd was lost. The worker writes it again.",
    "registry.duplicate_worker_name": "Another worker has the same name. Give each worker its own --name (WORKER_NAME).",
    "redis.unavailable": "{error}. Jobs, API keys and files are unavailable until it is back.",
    "redis.timed_out": "Redis did not answer within {timeout_s:g} s.",
    "redis.recovered": "Redis is back.",
}
"""Sentences by event. Braces hold a field of the event; a sentence begins with a capital letter and ends with a full stop."""
HIDDEN_FIELDS = frozenset({"timestamp", "level", "event", "exception", "worker", "gateway", "connection"})
"""Fields that are of no use on a terminal where one process runs."""
COLORS = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
PLAIN = "\x1b[0m"


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()


class TerminalRenderer:
    """The last processor of structlog, which renders an event as a line."""

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
        level, text = str(event.get("level", "info")), sentence(event)
        mark = f"{level}: " if level in COLORS and not self._colors else ""
        if self._colors and level in COLORS:
            text = f"{COLORS[level]}{text}{PLAIN}"
        trace = f"\n{event['exception']}" if event.get("exception") else ""
        return f"{event.get('timestamp', '')}  {mark}{text}{trace}"


def sentence(event: Mapping[str, Any]) -> str:
    """Return an event as a sentence; one without a sentence as its key and fields."""
    key = str(event.get("event", ""))
    if key in SENTENCES:
        try:
            return _tidy(SENTENCES[key].format_map({name: _plain(value) for name, value in event.items()}))
        except (KeyError, ValueError, TypeError):
            pass  # the event lacks a field of the sentence: show all its fields
    fields = [
        f"{name}={_plain(value)}" for name, value in event.items() if name not in HIDDEN_FIELDS and value is not None
    ]
    return "  ".join((key, *fields))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "nothing"
    return value


def _tidy(text: str) -> str:
    """Drop a second full stop where a message brings its own, and begin with a capital letter, except for names without one."""
    for twice in ("..", "?.", "!."):
        text = text.replace(twice, twice[0])
    return text if text.startswith("etcd") else text[:1].upper() + text[1:]
