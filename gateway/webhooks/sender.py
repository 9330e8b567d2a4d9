"""Webhooks: whoever submitted a job is told of its end, by a signed POST (https://www.standardwebhooks.com).

- At least once: a message is in the backlog `hooks` before its job counts as recorded, and leaves it when the receiver has
  answered 2xx, has said 410 Gone, or all tries are used up. The backlog survives restarts of gateways and of NATS, and
  counts the tries. All tries at one message have the same `webhook-id` and the same body.
- Whatever the receiver does takes one try, a bounded time, and nothing from other receivers' messages.
- The result is not in it: the body holds the job as `GET /v1/jobs/{id}` shows it.
- Redis is not needed for any of this; what the record says about deliveries follows when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit

import orjson
import structlog
from pydantic import BaseModel, ConfigDict

from backbone.bus.job_log import WorkItem, WorkQueue
from backbone.ssrf_guard import FetchRefused
from backbone.store.store import Store
from gateway import clock
from gateway.jobs.records import job_object, record_from_outcome
from gateway.webhooks.delivery_recorder import DeliveryNote, DeliveryRecorder, DeliveryState
from gateway.webhooks.signature import InvalidWebhookSecret, signature_headers
from schemas.errors import InvalidRequest, Unavailable
from schemas.jobs import WebhookDelivery
from schemas.outcome import Outcome
from schemas.redaction import REDACTOR

log = structlog.get_logger(__name__)

WEBHOOK_QUEUE_NAME = "hooks"
MAX_CONCURRENCY = 256
"""Tries at once, over all receivers: each costs a connection, and one that hangs its whole time."""
ACK_MARGIN_S = 15.0
"""Beyond the time of a try, before another gateway takes it for lost."""
JITTER = 0.2
"""Delays vary by this share, so that what failed together is not tried together."""
MAX_URL_LENGTH = 2048
STATUS_GONE = 410
INTERRUPTED_RETRY_S = 1.0
"""A try that a stopping gateway has cut off is made again after this."""

Secrets = Callable[[str], str | None]
"""The secret of a key by its id; the bootstrap key's is empty. None: there is no such key, or it is not known now."""


class Poster(Protocol):
    """What of `backbone.ssrf_guard.GuardedHttpClient` is needed."""

    def validate_url(self, url: str) -> None:
        """Raises FetchRefused for what can never work."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """The status of the answer. Raises FetchRefused when there was none."""


class WebhookMessage(BaseModel):
    """One message, as it waits in the backlog."""

    model_config = ConfigDict(frozen=True)

    owner: str
    job: str
    run: int
    key: str
    url: str
    body: str

    @property
    def id(self) -> str:
        """The `webhook-id`."""
        return f"evt_{self.job}_{self.run}"


class WebhookSender:
    """See the module's docstring. All gateways share the backlog; each runs one of these."""

    def __init__(
        self,
        queue: WorkQueue,
        store: Store,
        poster: Poster,
        secret_of: Secrets,
        *,
        delays_s: tuple[float, ...],
        timeout_s: float,
        clock: Callable[[], float] = clock.now,
        count: Callable[[DeliveryState], None] = lambda _: None,
    ) -> None:
        """`delays_s`: what lies between the tries, of which there is one more. `timeout_s`: what one try may take.
        `count`: told what became of each.
        """
        self._queue = queue
        self._store = store
        self._poster = poster
        self._notes = DeliveryRecorder(store)
        self._secret_of = secret_of
        self._delays_s = delays_s
        self._hold_s = timeout_s + ACK_MARGIN_S
        self._clock = clock
        self._count = count
        self._deliveries: set[asyncio.Task[None]] = set()

    def check_url(self, url: str) -> None:
        """Raises InvalidRequest for a URL that can never be told anything."""
        if len(url) > MAX_URL_LENGTH:
            raise InvalidRequest(f"the URL is longer than {MAX_URL_LENGTH} characters", param="webhook.url")
        try:
            self._poster.validate_url(url)
        except FetchRefused as error:
            raise InvalidRequest(str(error), param="webhook.url", code=error.info.code) from error

    async def enqueue(self, outcome: Outcome) -> None:
        """Have a recorded word's webhook told, once per (job, run); nothing happens where it has none.

        Raises Unavailable: repeat it then.
        """
        if not outcome.webhook:
            return
        record = await self._store.get(outcome.owner, outcome.job)
        if record is None or record.run != outcome.run or record.status is not outcome.status:
            record = record_from_outcome(outcome, int(self._clock()))
        moment = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        body = orjson.dumps({"type": f"job.{outcome.status.value}", "timestamp": moment, "data": job_object(record)})
        message = WebhookMessage(
            owner=outcome.owner,
            job=outcome.job,
            run=outcome.run,
            key=outcome.key,
            url=outcome.webhook,
            body=body.decode(),
        )
        await self._queue.put(f"{outcome.job}-{outcome.run}", message.model_dump_json().encode())

    async def run(self) -> None:
        """Send what waits, until cancelled. Tries that are cut off then are made again, by whichever gateway is there."""
        notes = asyncio.create_task(self._notes.run(), name="webhook-notes")
        try:
            async with contextlib.aclosing(
                self._queue.consume(max_unacked=MAX_CONCURRENCY, ack_wait_s=self._hold_s)
            ) as items:
                try:
                    async for item in items:
                        task = asyncio.create_task(self._handle(item), name=f"webhook-{item.id}")
                        self._deliveries.add(task)
                        task.add_done_callback(self._deliveries.discard)
                finally:
                    await _cancel_all(self._deliveries)
        finally:
            await _cancel_all({notes})

    async def _handle(self, item: WorkItem) -> None:
        try:
            await self._deliver(item)
        except asyncio.CancelledError:
            item.nak(INTERRUPTED_RETRY_S)
            raise
        except Unavailable as error:
            log.warning("webhook not settled; it may be told twice", item=item.id, error=str(error))

    async def _deliver(self, item: WorkItem) -> None:
        """One try: send, settle, note."""
        try:
            message = WebhookMessage.model_validate_json(item.data)
        except ValueError:
            log.error("webhook not readable; dropped", item=item.id)
            await item.ack()
            return
        status, error = await self._send(message)
        state = self._state(status, item.delivery)
        self._count(state)
        note = WebhookDelivery(at=int(self._clock()), attempt=item.delivery, status=status, error=error)
        self._notes.add(DeliveryNote(message.owner, message.job, message.run, note, state))
        fields = {
            "job": message.job,
            "run": message.run,
            "host": urlsplit(message.url).netloc,
            "attempt": item.delivery,
        }
        (log.warning if state == "failed" else log.info)("webhook", **fields, state=state, status=status, error=error)
        if state == "pending":
            item.nak(self._delay_s(item.delivery))
        else:
            await item.ack()

    async def _send(self, message: WebhookMessage) -> tuple[int | None, str | None]:
        """What the receiver answered, or why it did not."""
        body = message.body.encode()
        secret = self._secret_of(message.key)
        if secret is None:
            return None, "the API key that submitted the job is not there to sign with"
        try:
            headers = signature_headers(secret, message.id, int(self._clock()), body)
            return await self._poster.post(message.url, body, {"content-type": "application/json", **headers}), None
        except (FetchRefused, InvalidWebhookSecret) as error:
            return None, REDACTOR.redact(str(error))
        except Exception:
            log.exception("defect in webhooks", job=message.job)
            return None, "a defect in Nexus; the gateway's log has it"

    def _state(self, status: int | None, attempt: int) -> DeliveryState:
        if status is not None and 200 <= status < 300:
            return "delivered"
        return "failed" if status == STATUS_GONE or attempt > len(self._delays_s) else "pending"

    def _delay_s(self, attempt: int) -> float:
        """Between try number `attempt` and the next one."""
        return self._delays_s[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)


async def _cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
