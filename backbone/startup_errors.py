"""Reports why a process cannot start: a sentence on a terminal, else a log line."""

from __future__ import annotations

import os
import sys

import structlog

from backbone.logging import configure_logging
from backbone.secret_files import ConfigurationError
from backbone.terminal_log import is_terminal
from schemas.errors import NexusError

EXIT_CONFIGURATION_ERROR = 2
"""Exit code: the settings are invalid; another attempt cannot succeed."""
EXIT_DEPENDENCY_UNAVAILABLE = 1
"""Exit code: a dependency is unavailable or refuses this process; another attempt may succeed."""

log = structlog.get_logger(__name__)


def report_startup_error(event: str, error: Exception) -> int:
    """Report why the process cannot start, and return its exit code. Logging may not be configured yet."""
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
    """Return the error as a sentence."""
    if isinstance(error, NexusError):
        return error.info.message
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return str(error) or type(error).__name__


def exit_code(error: Exception) -> int:
    """Return the exit code for an error at startup."""
    wrong = isinstance(error, ConfigurationError) or (isinstance(error, NexusError) and error.info.status in (400, 404))
    return EXIT_CONFIGURATION_ERROR if wrong else EXIT_DEPENDENCY_UNAVAILABLE
