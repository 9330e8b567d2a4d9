"""What each role of etcd may read and write. Nothing here knows etcd's client."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from backbone.registry.keys import Keys

ROOT = "root"
GATEWAY = "gateway"
WORKER = "worker"


class Permission(StrEnum):
    """The kinds of permissions, by etcd's names."""

    READ = "READ"
    READWRITE = "READWRITE"


@dataclass(frozen=True, slots=True)
class Grant:
    """Over all keys that begin with `prefix`."""

    prefix: str
    kind: Permission


def grants(prefix: str) -> dict[str, tuple[Grant, ...]]:
    """Return the grants by role, which is called as its user is."""
    keys = Keys(prefix)
    return {
        GATEWAY: (
            Grant(keys.prefix, Permission.READ),
            Grant(keys.aliases, Permission.READWRITE),
            Grant(keys.services, Permission.READWRITE),
        ),
        WORKER: (
            Grant(keys.workers, Permission.READWRITE),
            Grant(keys.models, Permission.READWRITE),
            Grant(keys.services, Permission.READ),
        ),
    }
