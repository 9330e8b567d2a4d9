"""Batches as they are stored: every change of status follows the table of legal transitions."""

from __future__ import annotations

import pytest

from backbone.testing.documents import MemoryDocumentStore
from gateway.batches.repository import BatchRepository, IllegalBatchTransition
from schemas.batches import BATCH_TRANSITIONS, FINAL_STATUSES, Batch, BatchStatus

OWNER = "alice"


def batch(status: BatchStatus) -> Batch:
    return Batch(
        id="batch_" + "0" * 32,
        endpoint="/v1/chat/completions",
        input_file_id="file-" + "0" * 32,
        completion_window="24h",
        created_at=1_800_000_000,
        expires_at=1_800_086_400,
        owner=OWNER,
        key="",
        blob="blob",
        output_keep_s=60.0,
        status=status,
    )


@pytest.mark.parametrize("before", list(BatchStatus))
@pytest.mark.parametrize("after", list(BatchStatus))
async def test_only_legal_transitions_are_stored(before: BatchStatus, after: BatchStatus) -> None:
    """An illegal transition is an error, and leaves the batch as it is."""
    repository = BatchRepository(MemoryDocumentStore(), 60.0)
    stored = batch(before)
    await repository.add(stored)
    if after is before or after in BATCH_TRANSITIONS[before]:
        await repository.change(OWNER, stored.id, lambda old: old.model_copy(update={"status": after}))
        assert (await repository.get(OWNER, stored.id)).status is after
    else:
        with pytest.raises(IllegalBatchTransition):
            await repository.change(OWNER, stored.id, lambda old: old.model_copy(update={"status": after}))
        assert (await repository.get(OWNER, stored.id)).status is before


def test_final_statuses_are_those_that_nothing_follows() -> None:
    """They are OpenAI's four."""
    assert {"failed", "completed", "expired", "cancelled"} == FINAL_STATUSES
