"""What the console tells its user when something is wrong."""

from __future__ import annotations


class ConsoleError(Exception):
    """A message for the user, complete as it stands. The command ends with `exit_code`."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
