"""Bodies of requests that change many jobs or dead letters at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import InvalidRequest

MAX_ITEMS = 200
"""Jobs that one call changes."""
JOB_ID = r"^job_[0-9a-f]{32}$"

JobIdText = Annotated[str, Field(pattern=JOB_ID)]
FilterValue = Annotated[str, Field(max_length=512)]


class BulkRequest(BaseModel):
    """The body of a call that changes many jobs of the caller's team: either `ids` or `filter`."""

    model_config = ConfigDict(extra="forbid")

    ids: list[JobIdText] | None = Field(default=None, min_length=1, max_length=MAX_ITEMS)
    filter: dict[str, FilterValue | list[FilterValue]] | None = Field(default=None, max_length=40)
    """The parameters of the list of jobs, such as `{"status": "failed", "metadata[customer]": "42"}`. An empty one finds all."""
    limit: int = Field(default=100, strict=True, ge=1, le=MAX_ITEMS)
    """The maximum number of jobs of the filter that this call changes."""
    after: str = Field(default="", pattern="^(job_[0-9a-f]{32})?$")
    """The `next_after` of the previous call with this filter."""

    def parameters(self) -> list[tuple[str, str]]:
        """Return the filter as the parameters of a query. Raises InvalidRequest unless there are either ids or a filter."""
        if (self.ids is None) == (self.filter is None):
            raise InvalidRequest("Set either 'ids' or 'filter'.", param="filter")
        for name in ("after", "limit", "order", "fields"):
            if name in (self.filter or {}):
                raise InvalidRequest(
                    f"'{name}' is no filter. 'limit' and 'after' stand beside it.", param=f"filter.{name}"
                )
        pairs = [
            (name, one)
            for name, value in (self.filter or {}).items()
            for one in (value if isinstance(value, list) else [value])
        ]
        return [*pairs, ("limit", str(self.limit)), *([("after", self.after)] if self.after else [])]


class TeamBulkRequest(BulkRequest):
    """The body of a call that changes many jobs of any team. `ids` are jobs of `team`."""

    team: str = Field(default="", max_length=200)

    def parameters(self) -> list[tuple[str, str]]:
        """Return the filter as the parameters of a query. Raises InvalidRequest."""
        pairs = super().parameters()
        if self.ids is not None and not self.team:
            raise InvalidRequest("Name the team of the jobs.", param="team")
        if self.filter is not None and self.team:
            raise InvalidRequest("'team' goes with 'ids'. Name the team in the filter.", param="team")
        return pairs


class GroupRequest(BaseModel):
    """The body of a call that replays or deletes dead letters: either `ids`, or the `error` and `model` of a group."""

    model_config = ConfigDict(extra="forbid")

    ids: list[JobIdText] | None = Field(default=None, min_length=1, max_length=MAX_ITEMS)
    error: str | None = Field(default=None, max_length=512)
    model: str | None = Field(default=None, max_length=512)
    limit: int = Field(default=50, strict=True, ge=1, le=100)
    """The maximum number of dead letters of the group that this call changes."""
    before: int | None = Field(default=None, strict=True, ge=1)
    """The `next_before` of the previous call with this group."""

    def require_one_form(self) -> None:
        """Raise InvalidRequest unless the body names either ids or a group."""
        group = self.error is not None and self.model is not None
        if (self.ids is not None) == group or (
            self.ids is not None and (self.error is not None or self.model is not None)
        ):
            raise InvalidRequest("Set either 'ids', or both 'error' and 'model'.", param="error")
