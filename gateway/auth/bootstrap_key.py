"""Load the bootstrap key from the settings or from its file, which is created if it is missing."""

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
    """Return `GATEWAY_BEARER_TOKEN`, or the content of `GATEWAY_BEARER_TOKEN_FILE`; empty if neither is set.

    Gateways that share the file have one key, also when several of them create it at once. Raises ConfigurationError.
    """
    if settings.gateway_bearer_token and (key := settings.gateway_bearer_token.get_secret_value()):
        return key
    if not settings.gateway_bearer_token_file:
        return ""
    path = Path(settings.gateway_bearer_token_file)
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            _create(path)
    return read_secret(SETTING, str(path)).strip()


def _create(path: Path) -> None:
    """Create a key in a file that only its owner can read. Raises FileExistsError if another process was first.

    The complete file is linked into place: no process reads half a key, and an existing key is never replaced.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"nexus-{secrets.token_urlsafe(24)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        finally:
            temporary.unlink()
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigurationError(
            f"{SETTING}: the bootstrap key cannot be stored in {path}: {error.strerror}"
        ) from error
    log.info("auth.bootstrap_key_created", file=str(path))
