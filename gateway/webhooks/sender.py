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
from gateway.webhooks.delivery_recorder import DeliveryRecorder, Note, State
from gateway.webhooks.signature import InvalidWebhookSecret, signature_headers
from schemas.errors import InvalidRequest, Unavailable
from schemas.jobs import WebhookDelivery
from schemas.outcome import Outcome
from schemas.redaction import REDACTOR

log = structlog.get_logger(__name__)

BACKLOG = "hooks"
AT_ONCE = 256
"""Tries at once, over all receivers: each costs a connection, and one that hangs its whole time."""
HOLD_S = 15.0
"""Beyond the time of a try, before another gateway takes it for lost."""
JITTER = 0.2
"""Delays vary by this share, so that what failed together is not tried together."""
MAX_URL = 2048
GONE = 410
RETURNED_S = 1.0
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
        backlog: WorkQueue,
        store: Store,
        poster: Poster,
        secret_of: Secrets,
        *,
        delays_s: tuple[float, ...],
        timeout_s: float,
        clock: Callable[[], float] = clock.now,
        count: Callable[[State], None] = lambda _: None,
    ) -> None:
        """`delays_s`: what lies between the tries, of which there is one more. `timeout_s`: what one try may take.
        `count`: told what became of each.
        """
        self._backlog = backlog
        self._store = store
        self._poster = poster
        self._notes = DeliveryRecorder(store)
        self._secret_of = secret_of
        self._delays_s = delays_s
        self._hold_s = timeout_s + HOLD_S
        self._clock = clock
        self._count = count
        self._tries: set[asyncio.Task[None]] = set()

    def check_url(self, url: str) -> None:
        """Raises InvalidRequest for a URL that can never be told anything."""
        if len(url) > MAX_URL:
            raise InvalidRequest(f"the URL is longer than {MAX_URL} characters", param="webhook.url")
        try:
            self._poster.validate_url(url)
        except FetchRefused as error:
            raise InvalidRequest(str(error), param="webhook.url", code=error.info.code) from error

    async def enqueue(self, word: Outcome) -> None:
        """Have a recorded word's webhook told, once per (job, run); nothing happens where it has none.

        Raises Unavailable: repeat it then.
        """
        if not word.webhook:
            return
        record = await self._store.get(word.owner, word.job)
        if record is None or record.run != word.run or record.status is not word.status:
            record = record_from_outcome(word, int(self._clock()))
        moment = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        body = orjson.dumps({"type": f"job.{word.status.value}", "timestamp": moment, "data": job_object(record)})
        hook = WebhookMessage(
            owner=word.owner, job=word.job, run=word.run, key=word.key, url=word.webhook, body=body.decode()
        )
        await self._backlog.put(f"{word.job}-{word.run}", hook.model_dump_json().encode())

    async def run(self) -> None:
        """Send what waits, until cancelled. Tries that are cut off then are made again, by whichever gateway is there."""
        notes = asyncio.create_task(self._notes.run(), name="webhook-notes")
        try:
            async with contextlib.aclosing(
                self._backlog.consume(max_unacked=AT_ONCE, ack_wait_s=self._hold_s)
            ) as items:
                try:
                    async for item in items:
                        task = asyncio.create_task(self._settle(item), name=f"webhook-{item.id}")
                        self._tries.add(task)
                        task.add_done_callback(self._tries.discard)
                finally:
                    await _end(self._tries)
        finally:
            await _end({notes})

    async def _settle(self, item: WorkItem) -> None:
        try:
            await self._try(item)
        except asyncio.CancelledError:
            item.nak(RETURNED_S)
            raise
        except Unavailable as error:
            log.warning("webhook not settled; it may be told twice", item=item.id, error=str(error))

    async def _try(self, item: WorkItem) -> None:
        """One try: send, settle, note."""
        try:
            hook = WebhookMessage.model_validate_json(item.data)
        except ValueError:
            log.error("webhook not readable; dropped", item=item.id)
            await item.ack()
            return
        status, error = await self._send(hook)
        state = self._state(status, item.delivery)
        self._count(state)
        note = WebhookDelivery(at=int(self._clock()), attempt=item.delivery, status=status, error=error)
        self._notes.add(Note(hook.owner, hook.job, hook.run, note, state))
        said = {"job": hook.job, "run": hook.run, "host": urlsplit(hook.url).netloc, "attempt": item.delivery}
        (log.warning if state == "failed" else log.info)("webhook", **said, state=state, status=status, error=error)
        if state == "pending":
            item.nak(self._delay_s(item.delivery))
        else:
            await item.ack()

    async def _send(self, hook: WebhookMessage) -> tuple[int | None, str | None]:
        """What the receiver answered, or why it did not."""
        body = hook.body.encode()
        secret = self._secret_of(hook.key)
        if secret is None:
            return None, "the API key that submitted the job is not there to sign with"
        try:
            headers = signature_headers(secret, hook.id, int(self._clock()), body)
            return await self._poster.post(hook.url, body, {"content-type": "application/json", **headers}), None
        except (FetchRefused, InvalidWebhookSecret) as error:
            return None, REDACTOR.redact(str(error))
        except Exception:
            log.exception("defect in webhooks", job=hook.job)
            return None, "a defect in Nexus; the gateway's log has it"

    def _state(self, status: int | None, attempt: int) -> State:
        if status is not None and 200 <= status < 300:
            return "delivered"
        return "failed" if status == GONE or attempt > len(self._delays_s) else "pending"

    def _delay_s(self, attempt: int) -> float:
        """Between try number `attempt` and the next one."""
        return self._delays_s[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
