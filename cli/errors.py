"""What the console tells its user when something is wrong."""

from __future__ import annotations


class ConsoleError(Exception):
    """A message for the user, complete as it stands. The command ends with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class GatewayUnreachable(ConsoleError):
    """The gateway does not answer, or the connection broke: later it may work."""


class GatewayError(ConsoleError):
    """The gateway answered with an error. `status` is HTTP's, `code` the error object's."""

    def __init__(self, message: str, *, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
