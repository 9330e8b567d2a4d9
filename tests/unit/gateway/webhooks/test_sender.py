"""The webhook sender: messages, retries and the deliveries in the job's record."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from backbone.bus.job_log import WorkItem
from backbone.settings import GatewaySettings
from backbone.ssrf_guard import FetchRefused, GuardedHttpClient
from backbone.testing.store import MemoryStore
from gateway.webhooks.delivery_recorder import MAX_DELIVERIES
from gateway.webhooks.sender import JITTER, MAX_CONCURRENCY, MAX_HELD, WebhookSender
from gateway.webhooks.signature import InvalidWebhookSecret, signature_headers
from schemas.errors import InvalidRequest, Unavailable
from schemas.jobs import Capability, JobRecord, JobStatus, WebhookState
from schemas.outcome import Outcome
from tests.conftest import Eventually

SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
JOB = "job_0192f0e0c0007000800000000000000a"
OTHER = "job_0192f0e0c0007000800000000000000b"
URL = "https://hooks.example/nexus"
DELAYS_S = tuple(float(part) for part in GatewaySettings.model_fields["webhook_retries_s"].default.split(","))


class Clock:
    """A clock that advances only when a task sleeps."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class MemoryItem:
    def __init__(self, backlog: MemoryBacklog, item_id: str, data: bytes, delivery: int, stored_at: int) -> None:
        self.id, self.data, self.delivery, self._backlog = item_id, data, delivery, backlog
        self.stored_at = stored_at

    async def ack(self) -> None:
        self._backlog.finished.append(self.id)

    def nak(self, delay_s: float) -> None:
        self._backlog.delays.append(delay_s)
        self._backlog.clock.now += delay_s
        self._backlog.items.put_nowait(MemoryItem(self._backlog, self.id, self.data, self.delivery + 1, self.stored_at))

    def extend(self) -> None:
        pass


class MemoryBacklog:
    """In which a delay takes no time, and moves the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.items: asyncio.Queue[WorkItem] = asyncio.Queue()
        self.ids: set[str] = set()
        self.delays: list[float] = []
        self.finished: list[str] = []
        self.at_once = 0

    async def put(self, item_id: str, data: bytes) -> None:
        if item_id not in self.ids:
            self.ids.add(item_id)
            self.items.put_nowait(MemoryItem(self, item_id, data, 1, int(self.clock())))

    async def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        self.at_once = max_unacked
        while True:
            yield await self.items.get()

    async def oldest(self) -> int | None:
        raise NotImplementedError


class Receiver(GuardedHttpClient):
    """A receiver with scripted answers: a status, an exception, or no answer (None)."""

    def __init__(self, *answers: int | Exception | None) -> None:
        super().__init__(max_bytes=1, timeout_s=1)
        self.answers = list(answers)
        self.got: list[tuple[str, bytes, dict[str, str]]] = []

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        self.got.append((url, body, dict(headers)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, int)
        return answer


class Stage:
    """Webhooks with everything around them."""

    def __init__(self, *answers: int | Exception | None, secret: str | None = SECRET) -> None:
        self.clock = Clock()
        self.backlog = MemoryBacklog(self.clock)
        self.store = MemoryStore()
        self.receiver = Receiver(*answers)
        self.asked: list[str] = []
        self.webhooks = self.gateway(secret)

    def gateway(self, secret: str | None = SECRET) -> WebhookSender:
        def secret_of(key: str) -> str | None:
            self.asked.append(key)
            return secret

        return WebhookSender(
            self.backlog, self.store, self.receiver, secret_of, delays_s=DELAYS_S, timeout_s=15, clock=self.clock
        )

    @asynccontextmanager
    async def running(self, webhooks: WebhookSender | None = None) -> AsyncIterator[None]:
        task = asyncio.create_task((webhooks or self.webhooks).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def tell(self, outcome: Outcome | None = None) -> None:
        """Enqueue, and have everything sent."""
        await self.webhooks.enqueue(outcome or make_word())
        async with self.running():
            async with asyncio.timeout(20):
                while not self.backlog.finished:
                    await asyncio.sleep(0)

    async def record(self) -> JobRecord:
        record = await self.store.get("acme", JOB)
        assert record is not None
        return record


def make_word(**fields: Any) -> Outcome:
    return Outcome.model_validate(
        {
            "job": JOB,
            "status": JobStatus.COMPLETED,
            "owner": "acme",
            "endpoint": "/v1/chat/completions",
            "capability": Capability.CHAT,
            "model": "m",
            "public_model": "m",
            "key": "key_1",
            "webhook": URL,
            **fields,
        }
    )


def make_record(**fields: Any) -> JobRecord:
    return JobRecord.model_validate(
        {
            "job": JOB,
            "owner": "acme",
            "endpoint": "/v1/chat/completions",
            "model": "m",
            "public_model": "m",
            "created_at": 1,
            "status": JobStatus.QUEUED,
            "webhook": URL,
            "webhook_state": WebhookState(url=URL),
            **fields,
        }
    )


async def store_record(stage: Stage, **fields: Any) -> None:
    await stage.store.create(make_record(**fields), ttl_s=1e9)


async def test_receiver_can_check_what_it_gets():
    """The official library accepts headers and body; the body has the event and no result."""
    stage = Stage(204)
    await store_record(stage, status=JobStatus.COMPLETED, worker="gpu1")
    await stage.tell()
    [(url, body, headers)] = stage.receiver.got
    said = Webhook(SECRET).verify(body, headers)
    assert url == URL
    assert said["type"] == "job.completed"
    shown = {name: said["data"][name] for name in ("id", "object", "status", "worker", "result_url")}
    assert shown == {
        "id": JOB,
        "object": "job",
        "status": "completed",
        "worker": "gpu1",
        "result_url": f"/v1/jobs/{JOB}/result",
    }
    assert datetime.fromisoformat(said["timestamp"]).timestamp() == pytest.approx(stage.clock.now, abs=0.01)
    assert headers["webhook-id"] == f"evt_{JOB}_1"
    assert headers["content-type"] == "application/json"
    assert stage.asked == ["key_1"]
    assert stage.backlog.finished == [f"{JOB}-1"]


@pytest.mark.parametrize("fields", [None, {"run": 2, "status": JobStatus.QUEUED}])
async def test_the_message_tells_of_its_own_run(fields: dict[str, Any] | None):
    """Even if the record is deleted or belongs to another run."""
    stage = Stage(204)
    if fields:
        await store_record(stage, **fields)
    await stage.tell(make_word(status=JobStatus.FAILED, worker="gpu2"))
    said = json.loads(stage.receiver.got[0][1])
    assert said["type"] == "job.failed"
    assert (said["data"]["status"], said["data"]["run"], said["data"]["worker"]) == ("failed", 1, "gpu2")


@pytest.mark.parametrize("change", ["body", "webhook-id", "webhook-timestamp"])
def test_a_changed_message_is_found_out(change: str):
    """Any modification in transit invalidates the signature."""
    body = b'{"type":"job.completed"}'
    headers = signature_headers(SECRET, "evt_1", int(time.time()), body)
    if change == "body":
        body = body.replace(b"completed", b"failed")
    else:
        headers[change] = headers[change][:-1] + ("8" if headers[change][-1] != "8" else "9")
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body, headers)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_%%%", "whsec_é"])
def test_no_secret_signs_nothing(secret: str):
    """An empty or malformed secret is an error, since its signature could be forged."""
    with pytest.raises(InvalidWebhookSecret):
        signature_headers(secret, "evt_1", 1, b"{}")


async def test_tries_follow_the_schedule_and_then_end():
    """Ten attempts over three days, each signed with its own time; then the job shows `failed`."""
    stage = Stage(500)
    await store_record(stage)
    began = stage.clock.now
    await stage.tell()
    assert len(stage.receiver.got) == len(DELAYS_S) + 1 == 10
    for delay, wanted in zip(stage.backlog.delays, DELAYS_S, strict=True):
        assert wanted * (1 - JITTER) <= delay <= wanted * (1 + JITTER)
    assert 2 * 86_400 < stage.clock.now - began < 4.5 * 86_400
    assert len({body for _, body, _ in stage.receiver.got}) == 1
    assert {headers["webhook-id"] for _, _, headers in stage.receiver.got} == {f"evt_{JOB}_1"}
    stamps = [int(headers["webhook-timestamp"]) for _, _, headers in stage.receiver.got]
    assert stamps == sorted(set(stamps))
    state = (await stage.record()).webhook_state
    assert state is not None
    assert state.state == "failed"
    assert [delivery.attempt for delivery in state.deliveries] == list(range(1, 11))
    assert {delivery.status for delivery in state.deliveries} == {500}
    assert len(state.deliveries) == MAX_DELIVERIES


async def test_delays_differ():
    """What failed together is not tried together."""
    delays = set()
    for _ in range(3):
        stage = Stage(500, 200)
        await stage.tell()
        delays.add(stage.backlog.delays[0])
    assert len(delays) == 3


@pytest.mark.parametrize("failure", [500, 404, 302, 429, FetchRefused("the URL did not answer within 15 s")])
async def test_what_fails_is_tried_again(failure: int | Exception):
    """Errors, redirects and silence; the first 2xx ends it, and the job shows each try."""
    stage = Stage(failure, 202)
    await store_record(stage)
    await stage.tell()
    state = (await stage.record()).webhook_state
    assert state is not None
    assert state.state == "delivered"
    first, second = state.deliveries
    assert (first.status, first.error) == (
        (failure, None) if isinstance(failure, int) else (None, "the URL did not answer within 15 s")
    )
    assert (second.status, second.error, second.attempt) == (202, None, 2)


async def test_a_410_ends_the_delivery():
    """410: the receiver wants no more, and is asked no more."""
    stage = Stage(410)
    await store_record(stage)
    await stage.tell()
    assert len(stage.receiver.got) == 1
    state = (await stage.record()).webhook_state
    assert state is not None
    assert state.state == "failed"


async def test_without_a_secret_nothing_is_sent():
    """With an unknown key the attempt fails with a reason, and a later attempt may succeed."""
    stage = Stage(200, secret=None)
    await store_record(stage)
    await stage.tell()
    assert stage.receiver.got == []
    state = (await stage.record()).webhook_state
    assert state is not None
    assert "API key" in str(state.deliveries[0].error)


async def test_a_job_without_a_webhook_and_an_outcome_queued_twice():
    """Nothing is sent without a webhook, and an outcome recorded twice is sent once."""
    stage = Stage(200)
    await stage.webhooks.enqueue(make_word(webhook=""))
    assert stage.backlog.items.empty()
    await stage.webhooks.enqueue(make_word())
    await stage.tell()
    assert len(stage.receiver.got) == 1


async def test_one_that_hangs_does_not_hold_up_the_others(eventually: Eventually):
    """Other messages are delivered meanwhile, and concurrent attempts are bounded."""
    stage = Stage(None, 200)
    await stage.webhooks.enqueue(make_word(job=OTHER))
    async with stage.running():
        await eventually(lambda: stage.receiver.got)
        await stage.webhooks.enqueue(make_word())
        await eventually(lambda: stage.backlog.finished == [f"{JOB}-1"])
    assert stage.backlog.at_once == MAX_HELD


async def test_silent_receivers_of_one_team_delay_no_other_team(eventually: Eventually):
    """More messages than a gateway sends at once, to receivers that never answer: another team's message is sent."""
    stage = Stage(200)
    post = stage.receiver.post

    async def silent(url: str, body: bytes, headers: Mapping[str, str]) -> int:
        if "silent" in url:
            stage.receiver.got.append((url, body, dict(headers)))
            await asyncio.Event().wait()
        return await post(url, body, headers)

    stage.receiver.post = silent  # type: ignore[method-assign]
    for number in range(MAX_CONCURRENCY + 10):
        await stage.webhooks.enqueue(
            make_word(owner="evil", job=f"job_{number:032x}", webhook="https://silent.example/")
        )
    async with stage.running():
        await eventually(lambda: len(stage.receiver.got) == MAX_CONCURRENCY // 8)
        await stage.webhooks.enqueue(make_word())
        await eventually(lambda: stage.backlog.finished == [f"{JOB}-1"])


async def test_a_gateway_that_stops_hands_its_tries_back(eventually: Eventually):
    """The next gateway makes them again, and the receiver can tell that it is the same message."""
    stage = Stage(None, 200)
    await stage.webhooks.enqueue(make_word())
    async with stage.running():
        await eventually(lambda: stage.receiver.got)
    assert stage.backlog.finished == []
    async with stage.running(stage.gateway()):
        await eventually(lambda: stage.backlog.finished)
    first, second = stage.receiver.got
    assert first[1] == second[1]
    assert first[2]["webhook-id"] == second[2]["webhook-id"]


async def test_redis_away_delays_no_delivery(eventually: Eventually, monkeypatch: pytest.MonkeyPatch):
    """Messages are delivered; the record's deliveries follow when Redis is back."""
    monkeypatch.setattr("gateway.webhooks.delivery_recorder.RETRY_DELAY_S", 0.01)
    stage = Stage(500, 200)
    await store_record(stage)
    await stage.webhooks.enqueue(make_word())
    stage.store.available = False
    async with stage.running():
        await eventually(lambda: stage.backlog.finished)
        stage.store.available = True
        await eventually(lambda: noted(stage, "delivered"))
    state = (await stage.record()).webhook_state
    assert state is not None
    assert [delivery.status for delivery in state.deliveries] == [500, 200]


async def noted(stage: Stage, state: str) -> bool:
    webhook = (await stage.record()).webhook_state
    return webhook is not None and webhook.state == state


async def test_an_earlier_run_says_nothing_about_a_later_one():
    """A job that was tried again shows the deliveries of its new run alone; a job that has expired shows none."""
    stage = Stage(200)
    await store_record(stage, run=2)
    await stage.tell()
    assert await noted(stage, "pending")
    await stage.store.remove("acme", JOB)
    await stage.webhooks.enqueue(make_word(run=2))
    async with stage.running():
        async with asyncio.timeout(20):
            while len(stage.backlog.finished) < 2:
                await asyncio.sleep(0)


async def test_a_defect_is_a_failed_try():
    """Whatever goes wrong inside: the message is not lost, and not tried forever."""
    stage = Stage(RuntimeError("boom"), 200)
    await stage.tell()
    assert len(stage.receiver.got) == 2
    await stage.backlog.put("odd", b"{")
    async with stage.running():
        async with asyncio.timeout(20):
            while "odd" not in stage.backlog.finished:
                await asyncio.sleep(0)


async def test_an_outage_at_enqueue_is_raised(monkeypatch: pytest.MonkeyPatch):
    """The recorder must repeat the call."""
    stage = Stage(200)

    async def put(_id: str, _data: bytes) -> None:
        raise Unavailable

    monkeypatch.setattr(stage.backlog, "put", put)
    with pytest.raises(Unavailable):
        await stage.webhooks.enqueue(make_word())


@pytest.mark.parametrize(
    "url",
    [
        "ftp://hooks.example/",
        "hooks.example/x",
        "",
        "http://user:secret@hooks.example/",
        "http://127.0.0.1/",
        "http://[::1]:8080/",
        "http://169.254.169.254/latest/meta-data/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://localhost:3000/",
        "http://localhost./",
        "http://a.localhost/",
        "http://10.0.0.5/x",
        "http://hooks.exämple/",
        "http://hooks.example:0/",
        "https://hooks.example/" + "x" * 2048,
    ],
)
def test_urls_that_can_never_work_are_refused_at_once(url: str):
    """With the field's name; what a name resolves to is looked at when it is used."""
    with pytest.raises(InvalidRequest) as caught:
        Stage(200).webhooks.check_url(url)
    assert caught.value.info.param == "webhook.url"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", [URL, "http://hooks.example:8080/a?b=c", "https://93.184.216.34/", "http://xn--e1.example/"]
)
def test_public_urls_are_taken(url: str):
    """http and https, any port."""
    Stage(200).webhooks.check_url(url)
