"""Describes invalid settings to the person who set them: the setting, its requirement, and where the value came from."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from backbone.secret_files import ConfigurationError
from backbone.settings import CommonSettings

Settings = TypeVar("Settings", bound=CommonSettings)

ENV_FILE = Path(".env")
MAX_SHOWN_CHARACTERS = 60
"""Characters of a value that are shown."""
REQUIREMENTS = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "bool_parsing": "true or false",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
}
"""Requirements by pydantic's type of error. Values of these settings hold no secrets, so that they are shown."""


def read_settings(kind: type[Settings], flags: Collection[str] = ()) -> Settings:
    """Return the settings of the environment and `.env`. `flags`: variables that the command line has set.

    Raises ConfigurationError, with a sentence for each invalid setting.
    """
    try:
        return kind()
    except ValidationError as error:
        found = [_sentence(one, flags) for one in error.errors(include_url=False)]
        raise ConfigurationError(found[0] if len(found) == 1 else "\n".join(("invalid settings:", *found))) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigurationError(f"{ENV_FILE.absolute()} cannot be read: {why}") from None


def _sentence(error: ErrorDetails, flags: Collection[str]) -> str:
    name = "_".join(str(part) for part in error["loc"]).upper()
    must = REQUIREMENTS.get(error["type"])
    if must is None:
        return f"{name} ({_place(name, flags)}) is wrong: {error['msg'].removeprefix('Value error, ')}."
    value = str(error["input"])[:MAX_SHOWN_CHARACTERS]
    bounds = {key: _plain(bound) for key, bound in error.get("ctx", {}).items()}
    return f"{name} is '{value}' ({_place(name, flags)}): it must be {must.format_map(bounds)}."


def _plain(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def _place(name: str, flags: Collection[str]) -> str:
    """Return where the value came from. Environment variables precede the file, whatever their case."""
    if name in flags:
        return "on the command line"
    if name in {one.upper() for one in os.environ}:
        return "in the environment"
    if name in {one.upper() for one in dotenv_values(ENV_FILE)}:
        return f"in {ENV_FILE.absolute()}"
    return "by default"
