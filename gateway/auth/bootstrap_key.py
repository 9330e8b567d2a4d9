"""The bootstrap key: as set, or kept in a file, which is made where it is missing."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import structlog

from backbone.secret_files import ConfigurationError, read_secret
from backbone.settings import GatewaySettings

log = structlog.get_logger(__name__)

SETTING = "GATEWAY_BEARER_TOKEN_FILE"


def load_bootstrap_key(settings: GatewaySettings) -> str:
    """`GATEWAY_BEARER_TOKEN`, else what `GATEWAY_BEARER_TOKEN_FILE` holds; empty where neither is set. Raises ConfigurationError.

    Gateways that share the file have one key, also when they start at once and none has it yet.
    """
    if settings.gateway_bearer_token and (key := settings.gateway_bearer_token.get_secret_value()):
        return key
    if not settings.gateway_bearer_token_file:
        return ""
    path = Path(settings.gateway_bearer_token_file)
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            _make(path)
    return read_secret(SETTING, str(path)).strip()


def _make(path: Path) -> None:
    """A new key, in a file that only its owner reads. Raises FileExistsError, where another process was first, too.

    Linked into place when it is whole: nobody reads half a key, and nobody's key is replaced.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"nexus-{secrets.token_urlsafe(24)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        finally:
            fresh.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigurationError(f"{SETTING}: a key cannot be kept in {path}: {error.strerror}") from error
    log.info("auth.bootstrap_key_created", file=str(path))
