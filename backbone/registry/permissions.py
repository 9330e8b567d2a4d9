"""The permissions of each role of etcd, without a dependency on etcd's client."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from backbone.registry.keys import RegistryKeys

ROOT = "root"
GATEWAY = "gateway"
WORKER = "worker"


class EtcdPermission(StrEnum):
    """The kinds of permissions, by etcd's names."""

    READ = "READ"
    READWRITE = "READWRITE"


@dataclass(frozen=True, slots=True)
class EtcdGrant:
    """A permission for all keys that begin with `prefix`."""

    prefix: str
    kind: EtcdPermission


def role_grants(prefix: str) -> dict[str, tuple[EtcdGrant, ...]]:
    """Return the grants of each role. A role has the name of its user."""
    keys = RegistryKeys(prefix)
    return {
        GATEWAY: (
            EtcdGrant(keys.prefix, EtcdPermission.READ),
            EtcdGrant(keys.aliases, EtcdPermission.READWRITE),
            EtcdGrant(keys.holds, EtcdPermission.READWRITE),
            EtcdGrant(keys.services, EtcdPermission.READWRITE),
        ),
        WORKER: (
            EtcdGrant(keys.workers, EtcdPermission.READWRITE),
            EtcdGrant(keys.models, EtcdPermission.READWRITE),
            EtcdGrant(keys.descriptors, EtcdPermission.READWRITE),
            EtcdGrant(keys.services, EtcdPermission.READ),
        ),
    }
