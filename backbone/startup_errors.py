"""The last words of a process that cannot start: a sentence for a person, a log line for a collector of logs."""

from __future__ import annotations

import os
import sys

import structlog

from backbone.logging import configure_logging
from backbone.secret_files import ConfigurationError
from backbone.terminal_log import is_terminal
from schemas.errors import NexusError

EXIT_CONFIGURATION_ERROR = 2
"""Exit code: the settings cannot work, however often it is tried."""
EXIT_DEPENDENCY_UNAVAILABLE = 1
"""Exit code: something that the process needs is away or refuses it; another try may succeed."""

log = structlog.get_logger(__name__)


def report_startup_error(event: str, error: Exception) -> int:
    """Say why the process cannot start, and return its exit code. Logging may not be configured yet."""
    message = describe_error(error)
    if is_terminal():
        sys.stderr.write(f"nexus: {message}\n")
        sys.stderr.flush()
    else:
        if not structlog.is_configured():
            configure_logging("console" if os.environ.get("LOG_FORMAT") == "console" else "auto", "info")
        log.error(event, error=message)
    return exit_code(error)


def describe_error(error: Exception) -> str:
    """Return what is wrong, in words."""
    if isinstance(error, NexusError):
        return error.info.message
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return str(error) or type(error).__name__


def exit_code(error: Exception) -> int:
    """Return the exit code that an error of the start means."""
    wrong = isinstance(error, ConfigurationError) or (isinstance(error, NexusError) and error.info.status in (400, 404))
    return EXIT_CONFIGURATION_ERROR if wrong else EXIT_DEPENDENCY_UNAVAILABLE
