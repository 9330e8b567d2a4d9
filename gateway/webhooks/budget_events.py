"""Send `budget.warning` and `budget.exhausted` to the webhooks of keys and teams, as the webhooks of jobs are sent."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256

import orjson

from gateway import clock
from gateway.limits.budget_state import BudgetState, budget_object
from gateway.webhooks.sender import WebhookMessage, WebhookSender

EVENTS = {1: "budget.warning", 2: "budget.exhausted"}


class BudgetAnnouncer:
    """Queues the webhooks of budgets. Each is sent at least once in a period, also where several gateways see the same."""

    def __init__(self, webhooks: WebhookSender, owner_of: Callable[[str], str], currency: Callable[[], str]) -> None:
        """`owner_of`: returns the team of a key, by its id."""
        self._webhooks = webhooks
        self._owner_of = owner_of
        self._currency = currency

    async def announce(self, state: BudgetState, level: int) -> None:
        """Queue the webhook of a budget that has reached a level of `EVENTS`, if it has one. Raises Unavailable."""
        assigned = state.assigned
        if not assigned.webhook:
            return
        moment = datetime.fromtimestamp(clock.now(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = {"type": EVENTS[level], "timestamp": moment, "data": budget_object(state, self._currency())}
        unique = sha256(f"{assigned.name} {assigned.budget.amount} {level}".encode()).hexdigest()[:32]
        is_key = assigned.holder == "key"
        message = WebhookMessage(
            owner=self._owner_of(assigned.holder_id) if is_key else assigned.holder_id,
            job=f"budget_{unique}",
            run=state.window.start,
            key=assigned.holder_id if is_key else f"team:{assigned.holder_id}",
            url=assigned.webhook,
            body=orjson.dumps(event).decode(),
        )
        await self._webhooks.put(message)
