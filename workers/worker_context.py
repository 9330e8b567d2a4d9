"""The worker that runs the attempts, as they see it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from backbone.ids import new_token
from backbone.tracing.spans import Tracer
from schemas.frames import AttemptStarted
from workers.gateway_health import GatewayHealth
from workers.start_timer import StartTimer

TOKEN_PREFIX_LENGTH = 10


def make_tokens() -> Iterator[str]:
    """Yield names for attempts that no other process yields. They are no secret, as a synchronous job's reply subject is."""
    prefix = new_token()[:TOKEN_PREFIX_LENGTH]
    return (f"{prefix}{number:x}" for number in itertools.count())


@dataclass(frozen=True)
class WorkerContext:
    """The worker that runs the attempts."""

    worker: str
    backend: str
    gateways: GatewayHealth = field(default_factory=GatewayHealth, compare=False)
    adapts: bool = True
    """Parameters that the server lacks are replaced by the nearest equivalent, unless the job's alias decides; False: refused."""

    tokens: Iterator[str] = field(default_factory=make_tokens, compare=False)
    """The names of this worker's attempts at synchronous jobs."""
    tracer: Tracer | None = field(default=None, compare=False)
    """None where tracing is off."""
    start_timer: StartTimer = field(default_factory=StartTimer, compare=False)

    @cached_property
    def started(self) -> bytes:
        """The payload of STARTED."""
        return AttemptStarted(worker=self.worker, backend=self.backend).model_dump_json().encode()
