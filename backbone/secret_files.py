"""Secrets and certificates that settings name by file: read when they are needed, refused with the setting's name."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr


class ConfigurationError(Exception):
    """A setting cannot be used. The message is for the operator, says what to change, and holds no secret."""


def read_secret(setting: str, path: str) -> str:
    """What is in the file, less the line end that editors put there. Raises ConfigurationError, also for an empty file."""
    text = read_file(setting, path).decode(errors="replace").rstrip("\r\n")
    if not text:
        raise ConfigurationError(f"{setting}: {path} is empty")
    return text


def read_file(setting: str, path: str) -> bytes:
    """A file that a setting names. Raises ConfigurationError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting}: {path} cannot be read: {error.strerror}") from error


class Password:
    """A password from a setting or from a file; the file is read anew each time, so that a changed one needs no restart."""

    def __init__(self, name: str, value: SecretStr | None, file: str) -> None:
        """`name`: of the setting that holds it; `file` is what `<name>_FILE` says. Raises ConfigurationError."""
        self._name = name
        self._value = value.get_secret_value() if value else ""
        self._file = file
        if self._value and file:
            raise ConfigurationError(f"{name} and {name}_FILE are both set: remove one")
        if file:
            self.read()

    def __bool__(self) -> bool:
        return bool(self._value or self._file)

    def __repr__(self) -> str:
        return f"Password({self._name})"

    def read(self) -> str:
        """The password as it is now. Raises ConfigurationError."""
        return read_secret(f"{self._name}_FILE", self._file) if self._file else self._value
