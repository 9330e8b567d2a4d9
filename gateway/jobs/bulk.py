"""Cancels, retries and replays many jobs with one call: a bounded number, some at a time, each on its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from schemas.errors import NexusError

T = TypeVar("T")

MAX_CONCURRENCY = 8


@dataclass(slots=True)
class BulkOutcome:
    """What a call has done."""

    succeeded: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    """By job: its id, and the code and the message of the error."""

    def to_object(self, next_after: str | None) -> dict[str, Any]:
        """Return the API's object."""
        return {
            "object": "bulk_result",
            "matched": self.succeeded + len(self.errors),
            "succeeded": self.succeeded,
            "failed": len(self.errors),
            "errors": self.errors,
            "has_more": next_after is not None,
            "next_after": next_after,
        }

    def details(self) -> dict[str, Any]:
        """Return what the audit log keeps."""
        return {"succeeded": self.succeeded, "failed": len(self.errors)}


async def change_all(
    items: Sequence[T], id_of: Callable[[T], str], change: Callable[[T], Awaitable[object]]
) -> BulkOutcome:
    """Change each item. An error of one does not stop the others."""
    result, slots = BulkOutcome(), asyncio.Semaphore(MAX_CONCURRENCY)

    async def one(item: T) -> None:
        async with slots:
            try:
                await change(item)
            except NexusError as error:
                info = error.info
                result.errors.append(
                    {"id": id_of(item), "code": info.code or info.type, "message": info.public_message}
                )
            else:
                result.succeeded += 1

    async with asyncio.TaskGroup() as tasks:
        for item in items:
            tasks.create_task(one(item))
    return result
