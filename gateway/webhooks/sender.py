"""Sends webhooks: a signed POST at the end of each job that has a webhook URL (https://www.standardwebhooks.com).

- Delivery is at least once. A message is in the work queue `hooks` before its job counts as recorded. It leaves the queue when the
  receiver has answered 2xx or 410 Gone, or after the last attempt. The queue survives restarts of gateways and NATS and counts
  the attempts. All attempts have the same `webhook-id` and body.
- A receiver can delay only messages of its own team: each attempt is bounded in time, and each team in its concurrent attempts.
- The body holds the job as `GET /v1/jobs/{id}` returns it, without the result.
- Delivery does not need Redis. The deliveries in the job's record follow when Redis is available.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import monotonic
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
from gateway.limits.effective import Bound
from gateway.limits.owner_slots import OwnerSlots
from gateway.traces import JobTraces
from gateway.webhooks.delivery_recorder import DeliveryNote, DeliveryRecorder, DeliveryState
from gateway.webhooks.signature import InvalidWebhookSecret, signature_headers
from schemas.errors import InvalidRequest, Unavailable
from schemas.jobs import WebhookDelivery
from schemas.outcome import Outcome
from schemas.redaction import REDACTOR

log = structlog.get_logger(__name__)

WEBHOOK_QUEUE_NAME = "hooks"
MAX_HELD = 8192
"""The maximum number of messages that one gateway has taken. It sends some of them; the others wait for others of their owner."""
MAX_HELD_PER_OWNER = 2048
"""The number of waiting messages above which further ones of an owner are postponed, as after a failed attempt."""
MAX_CONCURRENCY = 256
"""The maximum number of concurrent attempts. Each holds a connection, up to its timeout."""
ACK_MARGIN_S = 15.0
"""The time added to an attempt's timeout before the queue redelivers its message."""
JITTER = 0.2
"""The share by which delays vary, so that messages that failed together are not retried together."""
MAX_URL_LENGTH = 2048
STATUS_GONE = 410
INTERRUPTED_RETRY_S = 1.0
"""The delay before an attempt that a stopping gateway interrupted is repeated."""

Bounds = Callable[[str, str], tuple[Bound, ...]]
"""Returns the limits on concurrent webhooks for the id of an API key and its owner."""
Secrets = Callable[[str], str | None]
"""Returns the webhook secret of an API key by the key's id (empty: the bootstrap key). None: the key is unknown."""


class Poster(Protocol):
    """The part of `backbone.ssrf_guard.GuardedHttpClient` that webhooks use."""

    def validate_url(self, url: str) -> None:
        """Check a URL. Raises FetchRefused if no POST to it can succeed."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post a body and return the status of the answer. Raises FetchRefused if there is none."""


class WebhookMessage(BaseModel):
    """One webhook message, as the work queue stores it."""

    model_config = ConfigDict(frozen=True)

    owner: str
    job: str
    """The job, or what else the message is about."""
    run: int
    key: str
    """The id of the API key whose secret signs the message, or `team:` and the team's id."""
    url: str
    body: str
    traceparent: str = ""
    """The span below which the job's trace goes on; empty: the job is not traced."""

    @property
    def id(self) -> str:
        """Return the `webhook-id`."""
        return f"evt_{self.job}_{self.run}"


class WebhookSender:
    """Queues and delivers webhooks. All gateways share the queue."""

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
        bounds_of: Bounds = lambda _, owner: (Bound(f"team:{owner}", MAX_CONCURRENCY // 8),),
        traces: JobTraces | None = None,
    ) -> None:
        """Create a sender.

        Args:
            queue: The work queue of messages.
            store: The record store.
            poster: Posts to receivers.
            secret_of: Returns the webhook secret of an API key.
            delays_s: The delays between attempts. There is one more attempt than delays.
            timeout_s: The timeout of one attempt.
            clock: Returns the time in Unix seconds.
            count: Receives the state after each attempt.
            bounds_of: Returns the limits on concurrent attempts.
            traces: Records the attempts. None: tracing is off.
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
        self._bounds_of = bounds_of
        self._traces = traces
        self._slots = OwnerSlots(MAX_CONCURRENCY, self._hold_s / 3)
        self._deliveries: set[asyncio.Task[None]] = set()

    def check_url(self, url: str) -> None:
        """Check a webhook URL. Raises InvalidRequest if no webhook can be delivered to it."""
        if len(url) > MAX_URL_LENGTH:
            raise InvalidRequest(
                f"The webhook URL is longer than {MAX_URL_LENGTH} characters. Use a shorter URL.", param="webhook.url"
            )
        try:
            self._poster.validate_url(url)
        except FetchRefused as error:
            raise InvalidRequest(str(error), param="webhook.url", code=error.info.code) from error

    async def enqueue(self, outcome: Outcome) -> None:
        """Queue the webhook of a recorded outcome, once per job and run. Does nothing if the job has no webhook.

        Raises Unavailable; the caller then repeats the call.
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
            traceparent=outcome.traceparent,
        )
        await self.put(message)

    async def put(self, message: WebhookMessage) -> None:
        """Queue a message, once per job and run. Raises Unavailable."""
        await self._queue.put(f"{message.job}-{message.run}", message.model_dump_json().encode())

    async def run(self) -> None:
        """Deliver queued messages until cancelled. Another gateway repeats interrupted attempts."""
        notes = asyncio.create_task(self._notes.run(), name="webhook-notes")
        try:
            async with contextlib.aclosing(self._queue.consume(max_unacked=MAX_HELD, ack_wait_s=self._hold_s)) as items:
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
            log.warning("webhook.ack_failed", item=item.id, error=str(error))

    async def _deliver(self, item: WorkItem) -> None:
        """Make one attempt, then acknowledge or reschedule the message and note the delivery."""
        try:
            message = WebhookMessage.model_validate_json(item.data)
        except ValueError:
            log.error("webhook.malformed", item=item.id)
            await item.ack()
            return
        bounds = self._bounds_of(message.key, message.owner)
        is_last = item.delivery > len(self._delays_s)
        if not is_last and any(self._slots.waiting[bound.name] >= MAX_HELD_PER_OWNER for bound in bounds):
            item.nak(self._delay_s(item.delivery))
            return
        async with self._slots.hold(bounds, item.extend):
            item.extend()
            began = monotonic()
            status, error = await self._send(message)
        state = self._state(status, item.delivery)
        self._count(state)
        note = WebhookDelivery(at=int(self._clock()), attempt=item.delivery, status=status, error=error)
        self._notes.add(DeliveryNote(message.owner, message.job, message.run, note, state))
        host = urlsplit(message.url).netloc
        fields = {
            "job": message.job,
            "run": message.run,
            "host": host,
            "attempt": item.delivery,
        }
        (log.warning if state == "failed" else log.info)(
            "webhook.attempted", **fields, state=state, status=status, error=error
        )
        if self._traces is not None:
            self._traces.record_webhook(
                message.traceparent, message.job, host, item.delivery, status,
                delivered=state == "delivered", started=began,
            )  # fmt: skip
        if state == "pending":
            item.nak(self._delay_s(item.delivery))
        else:
            await item.ack()

    async def _send(self, message: WebhookMessage) -> tuple[int | None, str | None]:
        """Post a message, and return the status of the answer or the reason why there is none."""
        body = message.body.encode()
        secret = self._secret_of(message.key)
        if secret is None:
            return None, "The API key that submitted the job no longer exists, so its webhook cannot be signed."
        try:
            headers = signature_headers(secret, message.id, int(self._clock()), body)
            return await self._poster.post(message.url, body, {"content-type": "application/json", **headers}), None
        except (FetchRefused, InvalidWebhookSecret) as error:
            return None, REDACTOR.redact(str(error))
        except Exception:
            log.exception("webhook.defect", job=message.job)
            return None, "Nexus failed to send the webhook because of a defect. See the gateway's log."

    def _state(self, status: int | None, attempt: int) -> DeliveryState:
        if status is not None and 200 <= status < 300:
            return "delivered"
        return "failed" if status == STATUS_GONE or attempt > len(self._delays_s) else "pending"

    def _delay_s(self, attempt: int) -> float:
        """Return the delay between an attempt and the next one."""
        return self._delays_s[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)


async def _cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
