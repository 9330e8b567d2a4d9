"""What a fair share of a queue depends on: the weights of the owners, and the slots of the workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backbone.bus.bus import Queue


@dataclass(frozen=True, slots=True)
class FairShare:
    """The gateway's knowledge that the bus needs in order to serve owners by their weights."""

    weight_of: Callable[[str], float] = lambda _: 1.0
    """The weight of an owner, above 0."""
    slots_of: Callable[[Queue], int] = lambda _: 1
    """How many jobs of a queue the live workers run at once."""
