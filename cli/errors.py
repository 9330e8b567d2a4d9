"""Errors of the console: each message is shown to the user as it stands."""

from __future__ import annotations

INTERRUPTED_EXIT_CODE = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT, as shells count."""


class ConsoleError(Exception):
    """A failure of a command. The message is complete; the command ends with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class GatewayUnreachable(ConsoleError):
    """The gateway did not answer, or the connection broke. A retry may succeed."""


class GatewayError(ConsoleError):
    """The gateway answered with an error. `status` is the HTTP status, `code` the code of the error object."""

    def __init__(self, message: str, *, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
