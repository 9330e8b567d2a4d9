"""What requests that come as a form have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class FormRequest(BaseModel):
    """The fields of a form: numbers and booleans are read from their text, and an empty field counts as not given."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value != ""} if isinstance(fields, dict) else fields
