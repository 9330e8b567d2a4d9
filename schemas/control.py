"""What a gateway says to one worker, on its control subject."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class ControlOp(StrEnum):
    """What to do."""

    CANCEL = "cancel"
    """Stop one run of a job: its caller is gone, or it was cancelled."""
    DRAIN = "drain"
    """Take no more jobs, finish those in hand, and leave."""


class Control(BaseModel):
    """One instruction."""

    model_config = ConfigDict(frozen=True)

    op: ControlOp
    job: str = ""
    run: int = 0
