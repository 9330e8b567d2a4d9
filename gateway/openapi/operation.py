"""Hold what the document says of one route, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

JSON = dict[str, Any]
Schema = type[BaseModel] | tuple[type[BaseModel], ...] | JSON
"""A model; several of which a body is one, told apart by `endpoint`; or a JSON schema where no model can say it."""

JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream"
TEXT: JSON = {"type": "string"}
EVENT: JSON = {
    "type": "object",
    "description": "One event of the stream.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
}
BINARY: JSON = {"type": "string", "format": "binary"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A success of a route."""

    description: str
    content: Mapping[str, Schema] = field(default_factory=dict)
    """Schema by media type; empty: no body."""
    headers: tuple[str, ...] = ()
    """Names from `HEADERS`, beside those that every answer has."""
    example: Any = None
    """Of the JSON body."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One route."""

    id: str
    """Generators make method names of it; it never changes."""
    tag: str
    summary: str
    """What it does, as a task: "Cancel a job"."""
    description: str
    answers: Mapping[int, Answer]
    scope: str | None = ""
    """The scope that the key must have; empty: any valid key; None: no key."""
    body: Schema | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """The body is a form with these files, described; the first one is required."""
    examples: Mapping[str, JSON] = field(default_factory=dict)
    """Bodies by title; the first is what "Try it out" sends."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Errors beyond those that the kind of route has, or their descriptions where they differ."""
    works: bool = False
    """It waits for an inference server, or hands over its answer."""
    refuses: bool = False
    """It answers further statuses of the 4xx kind; so does what `works`."""
    parameters: Mapping[str, JSON] = field(default_factory=dict)
    """What is to be added to FastAPI's parameters, by name; with `in`, a parameter that FastAPI does not know."""


def answer(shape: Schema, description: str, **options: Any) -> Mapping[int, Answer]:
    """Return a 200 with a JSON body."""
    return {200: Answer(description, {JSON_TYPE: shape}, **options)}
