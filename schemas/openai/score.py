"""Define the request of `POST /v1/score`, as in vLLM's API, and the fields that an answer must hold. All other fields pass unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from schemas.openai.chat import NeverStreamed, ServiceTier

Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class ScoreRequest(BaseModel):
    """A request to score pairs of texts with a cross-encoder: one text with one, one with each of several, or each with its own."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    text_1: Annotated[str, Field(min_length=1)] | Texts
    text_2: Annotated[str, Field(min_length=1)] | Texts
    service_tier: ServiceTier | None = None
    stream: NeverStreamed | None = None
    """Only false: this endpoint has no streams."""

    @model_validator(mode="after")
    def _form_pairs(self) -> Self:
        first, second = len(self.left), len(self.right)
        if first not in (1, second):
            raise PydanticCustomError(
                "pairs",
                f"'text_1' has {first} texts and 'text_2' has {second}. Send one text in 'text_1', or as many as 'text_2' has.",
            )
        return self

    @property
    def left(self) -> list[str]:
        """Return the texts of `text_1`."""
        return [self.text_1] if isinstance(self.text_1, str) else self.text_1

    @property
    def right(self) -> list[str]:
        """Return the texts of `text_2`."""
        return [self.text_2] if isinstance(self.text_2, str) else self.text_2


class PairScore(BaseModel):
    """The score of one pair."""

    model_config = ConfigDict(extra="allow")

    index: int
    """The index of the pair, from 0."""
    object: str | None = None
    score: float


class Scores(BaseModel):
    """The scores, in the order of the pairs."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    object: str | None = None
    created: int | None = None
    model: str
    data: list[PairScore]
    usage: dict[str, Any] | None = None
