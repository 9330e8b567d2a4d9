"""What workers cannot have said about durable jobs is refused, on memory and on a real nats-server alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from backbone.bus.job_log import WorkerLog
from backbone.bus.sealed_job_log import SealedJobLog
from backbone.bus.seals import SealSecret, attempt_token
from gateway.jobs.records import new_record
from schemas.frames import FrameKind, decode_frame, encode_frame
from schemas.job_events import NO_TOKEN, QUEUED, GateReply, GateRequest, GateVerdict
from schemas.jobs import Envelope, JobStatus
from schemas.outcome import Outcome, outcome_of
from tests.backbone.job_logs import World, envelope, next_of, read
from tests.conftest import Eventually, running
from tests.servers import Server, source

COMPLETED, FAILED, CANCELLED = JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED


@pytest.fixture(scope="module")
def seal_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from running(source().nats(tmp_path_factory.mktemp("seals")))


class Desk:
    """A gateway with seals, a worker, and anyone who has a worker's rights and was given nothing."""

    def __init__(self, world: World, log: SealedJobLog, worker: WorkerLog, refused: list[tuple[str, str]]) -> None:
        self.world, self.log, self.worker, self.refused = world, log, worker, refused

    async def given(self, **fields: Any) -> tuple[Envelope, bytes]:
        """A job's envelope as a worker gets it, and its message."""
        jobs: list[Any] = []
        await self.log.enqueue(envelope(self.world, **fields), b"{}")
        bus = await self.world.hand(jobs)
        bus.pull(self.world.queue, 1, 5.0, lambda *_: None)
        async with asyncio.timeout(20):
            while not jobs:
                await asyncio.sleep(0.01)
        jobs[0].ack()
        return Envelope.decode(jobs[0].message)[0], jobs[0].message

    async def forge(self, outcome: Outcome, payload: bytes = b"") -> None:
        assert await self.worker.store_outcome(outcome, payload)


@pytest.fixture(params=["memory", "nats"])
def seal_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("seal_nats").url if request.param == "nats" else None


@pytest.fixture
async def desk(seal_url: str | None) -> AsyncIterator[Desk]:
    world, refused = World(seal_url), list[tuple[str, str]]()
    await world.open_queue()
    log = SealedJobLog(await world.gateway(), lambda kind, job: refused.append((kind, job)))
    yield Desk(world, log, await world.worker(), refused)
    await world.close()


async def test_all_gateways_share_one_secret(desk: Desk) -> None:
    """Whichever of them sealed something, all the others know it."""
    others = await asyncio.gather(*(desk.world.gateway() for _ in range(5)))
    secrets = [other.seal_secret for other in others]
    assert secrets == [desk.log.seal_secret] * 5
    assert isinstance(secrets[0], SealSecret)
    assert len(secrets[0].key) == 32


async def test_what_the_worker_of_a_job_says_ends_it(desk: Desk) -> None:
    env, _ = await desk.given()
    await desk.forge(outcome_of(env, COMPLETED, token="t"), b"answer")
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert (stored_outcome.outcome.status, stored_outcome.payload, desk.refused) == (COMPLETED, b"answer", [])


async def test_a_gateway_ends_a_job_past_a_forgery(desk: Desk) -> None:
    env, _ = await desk.given()
    await desk.forge(outcome_of(env, COMPLETED, owner="mallory"))
    assert await desk.log.store_outcome(outcome_of(env, CANCELLED))
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert stored_outcome.outcome.status is CANCELLED
    assert desk.refused == [("outcome", env.job)]


FORGERIES: list[dict[str, Any]] = [
    {"seal": ""}, {"owner": "mallory"}, {"key": "key_x"}, {"webhook": "https://evil.example/"}, {"model": "x"}, {"public_model": "x"},
    {"endpoint": "/x"}, {"metadata": {"paid": "yes"}}, {"request_id": "x"}, {"run": 7}, {"batch": "b"}, {"uploads": ("f" * 32,)},
    {"status": CANCELLED}, {"status": JobStatus.EXPIRED},
]  # fmt: skip


@pytest.mark.parametrize("fields", FORGERIES, ids=lambda fields: "-".join(fields))
async def test_a_forged_outcome_ends_nothing_and_makes_room_for_the_true_one(
    desk: Desk, fields: dict[str, Any]
) -> None:
    env, _ = await desk.given()
    await desk.forge(outcome_of(env, COMPLETED).model_copy(update=fields), b"forged")
    assert await desk.log.read_outcome(env.job) is None
    assert desk.refused == [("outcome", env.job)]
    await desk.forge(outcome_of(env, COMPLETED, token="t"), b"answer")
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert stored_outcome.payload == b"answer"


async def test_an_outcome_of_one_job_is_none_of_another(desk: Desk) -> None:
    """Also where anyone who forges it was given a job of his own."""
    env, _ = await desk.given()
    mine, _ = await desk.given()
    await desk.forge(outcome_of(mine, COMPLETED).model_copy(update={"job": env.job}))
    assert await desk.log.read_outcome(env.job) is None


async def test_the_recorder_gets_true_outcomes_only(desk: Desk, eventually: Eventually) -> None:
    """A forged one is taken out of the way by itself, though nobody asks for it."""
    forged, _ = await desk.given()
    true, _ = await desk.given()
    async with aclosing(desk.log.consume_outcomes(max_unacked=8, ack_wait_s=30)) as outcomes:
        await desk.forge(outcome_of(forged, COMPLETED, owner="mallory"))
        await desk.forge(outcome_of(true, COMPLETED))
        item = await next_of(outcomes)
        while item.id != true.job:  # of other tests
            await item.ack()
            item = await next_of(outcomes)
        await item.ack()
        assert ("outcome", forged.job) in desk.refused
        await desk.forge(outcome_of(forged, COMPLETED), b"answer")
        item = await next_of(outcomes)
        assert (item.id, Outcome.decode(item.data)[1]) == (forged.job, b"answer")


async def test_events_are_those_of_attempts_that_were_given_the_job(desk: Desk) -> None:
    env, _ = await desk.given()
    other, _ = await desk.given()
    token = attempt_token(env.ticket)
    false = ["t", NO_TOKEN, token[:12], attempt_token(other.ticket), attempt_token("")]
    record = encode_frame(QUEUED, 1, 0, 0, NO_TOKEN, b'{"owner":"mallory"}')
    frames = [encode_frame("s", 1, 1, 0, one, b"{}") for one in false]
    writer = desk.worker.event_writer(env.job)
    for frame in (b"garbage", record, *frames, encode_frame("s", 1, 1, 0, token, b"{}"), *frames):
        writer.append(frame)
    await writer.flush()
    desk.log.append_event_unconfirmed(env.job, encode_frame(QUEUED, 1, 0, 0, NO_TOKEN, b'{"owner":"o"}'))
    async with aclosing(desk.log.follow_events(env.job)) as events:
        found = [decode_frame(data) for data in await read(events, 2)]
    assert [(frame.kind, frame.payload) for frame in found] == [("s", b"{}"), ("q", b'{"owner":"o"}')]
    assert [decode_frame(event.data).kind for event in await desk.log.first_events(env.job, 2)] == ["s", "q"]
    assert {kind for kind, _ in desk.refused} == {"event"}
    writer.close()


async def test_a_question_is_answered_to_whoever_was_given_the_job(desk: Desk, eventually: Eventually) -> None:
    env, _ = await desk.given()
    heard: list[GateReply | None] = []

    async def gate(_ask: GateRequest) -> GateReply:
        return GateReply(kind=GateVerdict.PROCEED)

    def ask(token: str) -> GateRequest:
        return GateRequest(kind=FrameKind.HEARTBEAT, job=env.job, run=1, delivery=1, token=token, owner="o", worker="w")

    await desk.log.serve_gate_requests(gate)
    desk.worker.request_gate(ask("stranger"), heard.append)
    await eventually(lambda: ("question", env.job) in desk.refused)
    desk.worker.request_gate(ask(attempt_token(env.ticket)), heard.append)
    await eventually(lambda: GateReply(kind=GateVerdict.PROCEED) in heard)


async def test_a_failed_job_is_tried_again_from_what_was_stored(desk: Desk) -> None:
    """Not from what its worker makes of it."""
    env, message = await desk.given()
    await desk.forge(outcome_of(env, FAILED, error={"message": "m", "type": "t", "status": 500}), message)
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert stored_outcome.payload == message
    await desk.log.delete_outcome(env.job, stored_outcome.seq)
    changed = env.model_copy(update={"owner": "mallory"}).encode(b"{}")
    await desk.forge(outcome_of(env, FAILED, error={"message": "m", "type": "t", "status": 500}), changed)
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert stored_outcome.payload == b""
    assert desk.refused == [("message", env.job)]


async def test_a_dead_letter_is_of_a_job_that_was_given(desk: Desk) -> None:
    env, message = await desk.given()
    outcome = outcome_of(env, FAILED, dead=True, error={"message": "m", "type": "t", "status": 500})
    await desk.worker.store_dead_letter(outcome, message)
    await desk.worker.store_dead_letter(outcome.model_copy(update={"owner": "mallory", "run": 2}), message)
    found = [letter.outcome.owner for letter in await desk.log.list_dead_letters() if letter.outcome.job == env.job]
    assert found == ["default"]
    await desk.worker.store_dead_letter(outcome.model_copy(update={"owner": "mallory", "run": 3}), message)
    letter = await desk.log.find_dead_letter(env.job)
    assert letter is not None
    assert (letter.outcome.owner, letter.message) == ("default", message)


async def test_an_item_that_no_gateway_put_there_is_dropped(desk: Desk) -> None:
    raw, sealed = await desk.world.gateway(), desk.log.work_queue("hooks")
    await raw.work_queue("hooks").put(f"forged-{id(desk)}", b'{"owner":"mallory"}')
    await sealed.put(f"true-{id(desk)}", b'{"owner":"o"}')
    async with aclosing(sealed.consume(max_unacked=4, ack_wait_s=30)) as items:
        item = await next_of(items)
        assert (item.id, item.data) == (f"true-{id(desk)}", b'{"owner":"o"}')
        await item.ack()
    assert desk.refused == [("item", f"forged-{id(desk)}")]


async def submitted_before(desk: Desk, monkeypatch: pytest.MonkeyPatch, env: Envelope) -> None:
    """Let the job's first event be older than the secret, and what comes now younger."""
    record = new_record(env, queue_s=60.0, expires_at=None)
    await desk.log.append_event(env.job, encode_frame(QUEUED, env.run, 0, 0, NO_TOKEN, record.encode()))
    [event] = await desk.log.first_events(env.job, 1)
    secret = desk.log.seal_secret
    assert secret is not None
    assert event.stored_at is not None
    later = SealSecret(b"another secret, of thirty-two b.", event.stored_at + 1)
    monkeypatch.setattr(type(desk.log), "_secret", property(lambda _: later))
    await asyncio.sleep(2.1)  # stamps are whole seconds: there is nothing to await


async def test_a_job_that_was_queued_before_there_were_seals_ends(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker has no seal to repeat: the job's own first event says what may be believed. It can be tried again, too."""
    env, message = await desk.given(ticket="", seal="", message_seal="")
    await submitted_before(desk, monkeypatch, env)
    token = attempt_token("")
    for number, kind in enumerate((FrameKind.STARTED, FrameKind.CHUNK)):
        await desk.log.append_event(env.job, encode_frame(kind.value, env.run, 1, number, token, b"{}"))
    assert [decode_frame(event.data).kind for event in await desk.log.first_events(env.job, 9)] == [
        QUEUED,
        "s",
        "c",
    ]
    await desk.forge(
        outcome_of(env, FAILED, seal="", token=token, error={"message": "m", "type": "t", "status": 500}), message
    )
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert stored_outcome.payload == message
    assert desk.refused == []


@pytest.mark.parametrize(
    "lie",
    [
        {"owner": "mallory"},
        {"key": "key_x"},
        {"webhook": "http://x.example/"},
        {"metadata": {"paid": "1"}},
        {"model": "x"},
    ],
)
async def test_what_disagrees_with_the_first_event_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any]
) -> None:
    """Also of a job that is older than seals; and so is a cancel, which only gateways say."""
    env, _ = await desk.given()
    await submitted_before(desk, monkeypatch, env)
    for outcome in (outcome_of(env, COMPLETED, seal="").model_copy(update=lie), outcome_of(env, CANCELLED, seal="")):
        await desk.forge(outcome)
        assert await desk.log.read_outcome(env.job) is None
    assert [kind for kind, _ in desk.refused] == ["outcome"] * 2


async def test_a_job_that_never_was_is_not_older(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its id says of its age."""
    env, _ = await desk.given()
    await submitted_before(desk, monkeypatch, env)
    other = env.model_copy(update={"job": "job_" + "0" * 12 + "7" + "0" * 19})
    await desk.forge(outcome_of(other, COMPLETED, seal=""))
    assert await desk.log.read_outcome(other.job) is None
    assert desk.refused == [("outcome", other.job)]


async def test_what_is_older_than_the_secret_is_believed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that were stored before there were seals are still there after an upgrade."""
    env, _ = await desk.given()
    secret = desk.log.seal_secret
    assert secret is not None
    await desk.forge(outcome_of(env, COMPLETED, seal=""), b"old answer")
    later = SealSecret(secret.key, secret.made_at + 3600)
    monkeypatch.setattr(type(desk.log), "_secret", property(lambda _: later))
    stored_outcome = await desk.log.read_outcome(env.job)
    assert stored_outcome is not None
    assert stored_outcome.payload == b"old answer"
