"""Structured logs: one JSON object a line on standard output, or coloured text for a person."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import orjson
import structlog


def _dumps(event: Any, **_: Any) -> bytes:
    return orjson.dumps(event, default=str)


def configure_logging(log_format: Literal["json", "console"], level: str) -> None:
    """Set up structlog, and send what libraries log through `logging` the same way. Called once, at the edge."""
    number = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    console = log_format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
        if console
        else structlog.processors.JSONRenderer(_dumps)
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory() if console else structlog.BytesLoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    formatter_renderer = renderer if console else structlog.processors.JSONRenderer(lambda e, **_: _dumps(e).decode())
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=formatter_renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
