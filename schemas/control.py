"""Define the instructions that a gateway sends to one worker, on the worker's control subject."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from schemas.logs import LogRequest


class ControlOp(StrEnum):
    """The kind of an instruction."""

    CANCEL = "cancel"
    """Stop one run of a job, because its caller disconnected or it was cancelled."""
    DRAIN = "drain"
    """Pull no more jobs, finish the running ones, and shut down."""
    LOGS = "logs"
    """Send the newest log lines. Earlier workers do not answer."""


class Control(BaseModel):
    """One instruction."""

    model_config = ConfigDict(frozen=True)

    op: ControlOp
    job: str = ""
    run: int = 0
    logs: LogRequest | None = None
