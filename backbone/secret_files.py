"""Reads secrets and certificates from the files that settings name, when they are needed; errors name the setting."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr


class ConfigurationError(Exception):
    """A setting cannot be used. The message is for the operator, says what to change, and holds no secret."""


def read_secret(setting: str, path: str) -> str:
    """Return the content of the file without the line end that editors add. Raises ConfigurationError, also for an empty file."""
    text = read_file(setting, path).decode(errors="replace").rstrip("\r\n")
    if not text:
        raise ConfigurationError(f"{setting}: {path} is empty")
    return text


def read_file(setting: str, path: str) -> bytes:
    """Return the content of a file that a setting names. Raises ConfigurationError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting}: {path} cannot be read: {error.strerror}") from error


class Password:
    """A password from a setting or a file. The file is read each time, so that a changed password needs no restart."""

    def __init__(self, name: str, value: SecretStr | None, file: str) -> None:
        """Check the setting. `name`: of the setting with the password; `file`: the value of `<name>_FILE`. Raises
        ConfigurationError.
        """
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
        """Return the current password. Raises ConfigurationError."""
        return read_secret(f"{self._name}_FILE", self._file) if self._file else self._value
