"""A whole worker in memory: its presence, and the fate of its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from backbone.bus.bus import MAX_FRESH_AGE_S
from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from backbone.testing.job_log import MemoryWorkerLog
from backbone.testing.registry import MemoryHub, MemoryRegistry
from gateway.dispatcher import Dispatcher
from gateway.http.inference_body import ReceivedRequest
from gateway.metrics import GatewayMetrics
from gateway.sync.request_state import RequestState, SyncRequest
from gateway.sync.submitter import SyncSubmitter
from schemas.frames import Progress
from schemas.jobs import Capability, Lane, Limits
from schemas.presence import BackendLoad, Limitation, ModelOffer, WorkerState
from tests.conftest import Eventually
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendUnavailable,
    Chunk,
    Discovery,
    Finish,
    Output,
    Push,
    Requirement,
    Task,
)
from workers.metrics import WorkerMetrics
from workers.worker import Worker


class Script(Backend):
    """An adapter that the test controls."""

    def __init__(self) -> None:
        super().__init__(BackendConfig())
        self.models = ["m"]
        self.slots = 2
        self.up = True
        self.ran: list[str] = []
        self.stopped: list[str] = []
        self.lacking: tuple[Limitation, ...] = ()
        self.load: BackendLoad | None = None
        self.needs: tuple[Requirement, ...] = ()
        self.problems: tuple[str, ...] = ()
        self.go = asyncio.Event()
        self.go.set()

    def requirements(self) -> tuple[Requirement, ...]:
        return self.needs

    def limitations(self) -> tuple[Limitation, ...]:
        return self.lacking

    def load_figures(self) -> BackendLoad | None:
        return self.load

    async def discover(self) -> Discovery:
        await self.health()
        offers = tuple(ModelOffer(name=n, capabilities=(Capability.CHAT,)) for n in self.models)
        return Discovery(offers, self.slots, self.problems)

    async def health(self) -> None:
        if not self.up:
            raise BackendUnavailable("down")

    async def run(self, task: Task) -> AsyncIterator[Output]:
        self.ran.append(task.job)
        try:
            await self.go.wait()
            yield Chunk(b"answer of " + task.model.encode())
            yield Finish()
        finally:
            self.stopped.append(task.job)


class Rig:
    """One gateway's dispatcher and one worker, without any server."""

    def __init__(self) -> None:
        self.broker, self.hub, self.backend = MemoryBroker(), MemoryHub(), Script()
        registry = MemoryRegistry(self.hub)
        self.blobs = MemoryBlobStore()
        self.dispatcher = Dispatcher(MemoryGatewayBus(self.broker), registry, GatewayMetrics(), Limits())
        self.submitter = SyncSubmitter(self.dispatcher, 15.0)
        self.registry = registry
        self.worker = Worker(
            worker_id="w", host="h", backend=self.backend, blobs=self.blobs, log=MemoryWorkerLog(self.broker),
            registry=MemoryRegistry(self.hub), metrics=WorkerMetrics(), ack_wait_s=15.0, health_interval_s=0.05, drain_s=0.2,
        )  # fmt: skip
        self.life: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.dispatcher.bus.start()
        await self.registry.start()
        await self.dispatcher.start()
        await self.submitter.start()
        self.life = asyncio.create_task(self.worker.run(MemoryWorkerBus(self.broker, self.worker.on_job)))

    def call(self, model: str = "m", received: ReceivedRequest | None = None, *, stream: bool = False) -> SyncRequest:
        return self.submitter.submit(
            request_id="req", endpoint="/", capability=Capability.CHAT, lane=Lane.DEFAULT, public_model=model, stream=stream,
            owner="o", received=received or ReceivedRequest(None, b"{}"),
        )  # fmt: skip

    def live(self) -> list[str]:
        return [model.name for model in self.dispatcher.catalog.list_live()]

    def problems(self) -> tuple[str, ...]:
        snapshot = self.registry.snapshot
        worker = snapshot.workers.get("w") if snapshot else None
        return worker.problems if worker else ()

    def state(self) -> WorkerState | None:
        snapshot = self.registry.snapshot
        worker = snapshot.workers.get("w") if snapshot else None
        return worker.state if worker else None


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    await made.start()
    yield made
    made.backend.go.set()
    made.worker.drain()
    assert made.life is not None
    await made.life
    await made.submitter.close()
    await made.dispatcher.close()


async def test_a_job_is_run_and_answered(rig: Rig, eventually: Eventually) -> None:
    """From submit to answer, through the queue."""
    await eventually(lambda: rig.live() == ["m"])
    call = rig.call()
    await call.wait_until_ended()
    assert (call.error, call.take_output()) == (None, b"answer of m")
    await eventually(lambda: not rig.broker.jobs)


async def test_only_an_attempt_that_goes_on_asks_its_gateway(rig: Rig, eventually: Eventually) -> None:
    """A short attempt sends its answer and nothing else; a longer one asks once whether its caller still waits."""
    asked: list[bytes] = []
    await eventually(lambda: rig.live() == ["m"])
    bus = rig.worker._bus
    assert bus is not None
    request = bus.request

    def note(reply: str, frame: bytes, on_answer: Callable[[bytes | None], None]) -> int:
        asked.append(frame)
        return request(reply, frame, on_answer)

    bus.request = note  # type: ignore[method-assign]
    call = rig.call()
    await call.wait_until_ended()
    assert (call.worker, call.starts, asked) == ("w", 1, [])
    rig.backend.go.clear()
    call = rig.call()
    await eventually(lambda: call.state is RequestState.RUNNING)
    assert call.worker == "w"
    rig.backend.go.set()
    await call.wait_until_ended()
    assert (call.error, len(asked)) == (None, 1)


async def test_pushed_output_stands_between_the_yielded_one(
    rig: Rig, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an adapter pushes while it waits for its server reaches the caller in order, and counts its tokens."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.go.clear()
    pushes: list[Push] = []

    async def run(task: Task) -> AsyncIterator[Output]:
        yield Chunk(b"a")
        assert task.push is not None
        pushes.append(task.push)
        await rig.backend.go.wait()
        yield Chunk(b"c")
        yield Finish()

    monkeypatch.setattr(rig.backend, "run", run)
    call = rig.call(stream=True)
    await eventually(lambda: pushes)
    pushes[0](b"b", 2)
    rig.backend.go.set()
    await call.wait_until_ended()
    assert (call.error, call.take_output()) == (None, b"abc")
    assert call.done is not None
    assert call.done.tokens == 4


async def test_new_models_are_noticed(rig: Rig, eventually: Eventually) -> None:
    """A model that the backend gains is served without a restart; one that it loses is no longer offered."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.models = ["other"]
    await eventually(lambda: rig.live() == ["other"])
    call = rig.call("other")
    await call.wait_until_ended()
    assert call.take_output() == b"answer of other"


async def test_a_name_that_no_subject_can_hold_does_no_harm(rig: Rig, eventually: Eventually) -> None:
    """A model with an over-long name is left out; the backend's others, and those that come later, are served."""
    rig.backend.models = ["日本/…" * 40, "fine"]
    await eventually(lambda: rig.live() == ["fine"])
    rig.backend.models = ["日本/…" * 40, "later"]
    await eventually(lambda: rig.live() == ["later"])
    call = rig.call("later")
    await call.wait_until_ended()
    assert call.error is None


async def test_what_models_lack_is_shown(rig: Rig, eventually: Eventually) -> None:
    """The registry lists limitations until they expire."""
    await eventually(lambda: rig.live() == ["m"])

    def shown() -> tuple[Limitation, ...] | None:
        return rig.registry.snapshot.workers["w"].limitations if rig.registry.snapshot else None

    rig.backend.lacking = (Limitation(model="m", feature="stream", since=1, until=601),)
    await eventually(lambda: shown() == rig.backend.lacking)


async def test_load_figures_are_in_the_registry(rig: Rig, eventually: Eventually) -> None:
    """The registry holds the load figures that the backend reported last."""
    await eventually(lambda: rig.live() == ["m"])

    def shown() -> BackendLoad | None:
        return rig.registry.snapshot.workers["w"].load if rig.registry.snapshot else None

    assert shown() is None
    rig.backend.load = BackendLoad(running=3, waiting=2, kv_cache_usage=0.5)
    await eventually(lambda: shown() == rig.backend.load)


async def test_a_backend_that_is_down_takes_no_jobs(rig: Rig, eventually: Eventually) -> None:
    """While its backend is down a worker is listed as unhealthy; afterwards it serves again."""
    await eventually(lambda: rig.state() is WorkerState.READY)
    rig.backend.up = False
    await eventually(lambda: rig.state() is WorkerState.UNHEALTHY)
    assert rig.live() == []
    rig.backend.up = True
    await eventually(lambda: rig.live() == ["m"])
    call = rig.call()
    await call.wait_until_ended()
    assert call.error is None


async def test_a_caller_who_leaves_stops_the_backend(rig: Rig, eventually: Eventually) -> None:
    """The gateway notifies the worker, and the backend's work ends."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.go.clear()
    call = rig.call()
    await eventually(lambda: rig.backend.ran and call.state is RequestState.RUNNING)
    rig.submitter.finish(call)
    await eventually(lambda: rig.backend.stopped)
    await eventually(lambda: not rig.broker.jobs)


async def test_a_drained_worker_leaves_before_it_stops(rig: Rig, eventually: Eventually) -> None:
    """It leaves the registry while its last job still runs; a job that does not end goes back to the queue."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.go.clear()
    call = rig.call()
    await eventually(lambda: call.state is RequestState.RUNNING)
    rig.worker.drain()
    await eventually(lambda: rig.state() is None)
    await eventually(lambda: call.state is RequestState.QUEUED)
    assert call.starts == 0
    assert len(rig.broker.jobs) == 1
    rig.submitter.finish(call)


async def test_loading_has_a_limit_of_its_own(
    rig: Rig, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading may take longer than a token, and the limits restart after it."""
    await eventually(lambda: rig.live() == ["m"])
    rig.dispatcher._limits = dict.fromkeys(Capability, Limits(first_token_s=0.4, idle_s=0.4, load_s=30))
    loaded = asyncio.Event()

    async def load(_task: Task) -> AsyncIterator[Output]:
        yield Progress(phase="load")
        await loaded.wait()
        yield Progress(phase="run")
        yield Chunk(b"loaded")
        yield Finish()

    monkeypatch.setattr(rig.backend, "run", load)
    call = rig.call()
    await eventually(lambda: call.progress is not None)
    await asyncio.sleep(1.0)  # past every other limit
    assert call.error is None
    loaded.set()
    await call.wait_until_ended()
    assert (call.error, call.take_output()) == (None, b"loaded")


async def test_a_load_that_never_ends_is_given_up(
    rig: Rig, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    await eventually(lambda: rig.live() == ["m"])
    rig.dispatcher._limits = dict.fromkeys(Capability, Limits(load_s=0.2))

    async def load(_task: Task) -> AsyncIterator[Output]:
        yield Progress(phase="load")
        await asyncio.Event().wait()

    monkeypatch.setattr(rig.backend, "run", load)
    call = rig.call()
    await call.wait_until_ended()
    assert call.error is not None
    assert "load limit" in call.error.message


async def test_a_store_that_is_away_gives_the_job_back(rig: Rig, eventually: Eventually) -> None:
    """A body by reference that cannot be read now does not fail the request."""
    await eventually(lambda: rig.live() == ["m"])
    writer = rig.blobs.writer(ttl_s=60)
    await writer.write(b"{}")
    name = (await writer.close()).name
    rig.blobs.available = False
    call = rig.call(received=ReceivedRequest(None, b"", body_blob=name))
    await eventually(lambda: call.return_error is not None)
    rig.blobs.available = True
    rig.backend.go.set()
    await call.wait_until_ended()
    assert (call.error, call.take_output()) == (None, b"answer of m")


async def test_a_body_that_is_gone_is_a_clear_end(rig: Rig, eventually: Eventually) -> None:
    await eventually(lambda: rig.live() == ["m"])
    call = rig.call(received=ReceivedRequest(None, b"", body_blob="0" * 32))
    await call.wait_until_ended()
    assert call.error is not None
    assert call.error.code == "content_gone"


async def test_queued_jobs_of_a_gateway_that_died_reach_no_backend(rig: Rig, eventually: Eventually) -> None:
    """Its queued jobs are acknowledged without a backend call, including the first; the next gateway is served."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.go.clear()
    running = [rig.call(), rig.call()]
    await eventually(lambda: len(rig.backend.ran) == 2 and all(call.state is RequestState.RUNNING for call in running))
    for _ in range(5):
        rig.call()
    await eventually(lambda: len(rig.broker.jobs) == 7)
    await asyncio.sleep(4 * MAX_FRESH_AGE_S)  # they have waited: there is nothing to await
    await rig.dispatcher.bus.close()  # nobody listens for its replies any more
    rig.backend.go.set()
    await eventually(lambda: not rig.broker.jobs, timeout_s=20)
    assert len(rig.backend.ran) == 2


async def test_a_gateway_that_is_only_reconnecting_gets_its_answer(rig: Rig, eventually: Eventually) -> None:
    """A fresh job starts at once; the backend is stopped while its gateway is unreachable, and runs again when that is back."""
    await eventually(lambda: rig.live() == ["m"])
    first = rig.call()
    await first.wait_until_ended()  # the first message tells the worker nothing about its age
    rig.backend.go.clear()
    listeners = dict(rig.broker.listeners)
    rig.broker.listeners.clear()
    call = rig.call()
    rig.broker.listeners.pop(call.envelope.reply, None)
    await eventually(lambda: len(rig.backend.stopped) == 2, what="the backend has been stopped")
    assert call.state is RequestState.QUEUED
    rig.broker.listeners.update(listeners)
    rig.broker.listeners[call.envelope.reply] = call.on_event
    rig.backend.go.set()
    await call.wait_until_ended()
    assert (call.error, call.take_output(), call.starts) == (None, b"answer of m", 1)


async def test_a_refused_connection_stops_pulling_until_the_backend_answers(rig: Rig, eventually: Eventually) -> None:
    """Pulling stops at once, whatever the health interval; the failed job is taken again afterwards, and loses no attempt."""
    await eventually(lambda: rig.live() == ["m"])
    asked = 0

    async def refused(task: Task) -> AsyncIterator[Output]:
        rig.backend.ran.append(task.job)
        rig.backend.up = False
        raise BackendUnavailable("no connection", unsent=True)
        yield Finish()

    usual, rig.backend.run = rig.backend.run, refused  # type: ignore[method-assign]
    call = rig.call()
    await eventually(lambda: rig.state() is WorkerState.UNHEALTHY)
    asked = len(rig.backend.ran)
    assert asked == 1
    assert (call.state, call.starts, call.error) == (RequestState.QUEUED, 0, None)
    rig.backend.run, rig.backend.up = usual, True  # type: ignore[method-assign]
    await call.wait_until_ended()
    assert (call.error, call.take_output(), call.starts) == (None, b"answer of m", 1)


async def test_a_backend_that_asks_to_wait_is_left_alone_and_that_is_shown(rig: Rig, eventually: Eventually) -> None:
    """Its other models are served meanwhile."""
    rig.backend.models = ["m", "n"]
    await eventually(lambda: rig.live() == ["m", "n"])
    usual = rig.backend.run

    async def busy(task: Task) -> AsyncIterator[Output]:
        if task.model == "m":
            rig.backend.ran.append(task.job)
            raise BackendUnavailable("busy", pause_s=60.0, retry_after_s=60.0)
        async for output in usual(task):
            yield output

    rig.backend.run = busy  # type: ignore[method-assign]
    call = rig.call()

    def paused() -> list[str]:
        snapshot = rig.registry.snapshot
        return [pause.model for pause in snapshot.workers["w"].pauses] if snapshot else []

    await eventually(lambda: paused() == ["m"])
    other = rig.call("n")
    await other.wait_until_ended()
    assert other.take_output() == b"answer of n"
    assert len(rig.backend.ran) == 2
    assert (call.state, call.starts, call.error) == (RequestState.QUEUED, 0, None)
    call.abandon()


@dataclass
class Need:
    """A requirement that is missing until the test changes that."""

    optional: bool = False
    capabilities: tuple[Capability, ...] = ()
    missing: bool = True

    def problem(self) -> str | None:
        return "The thing is not there. Install it." if self.missing else None


async def test_without_what_its_adapter_needs_a_worker_is_not_ready(eventually: Eventually) -> None:
    """The worker says why, in the registry and at its probes; it serves once the requirement is installed."""
    rig = Rig()
    need = Need()
    rig.backend.needs = (need,)
    await rig.start()
    await eventually(lambda: rig.state() is WorkerState.UNHEALTHY)
    sentence = "The script adapter cannot work yet. The thing is not there. Install it."
    expected = (sentence.replace("script", rig.backend.name),)
    assert (rig.problems(), rig.worker.problems) == (expected, expected)
    assert rig.live() == []
    assert rig.worker.state == "unhealthy"
    need.missing = False
    await eventually(lambda: rig.live() == ["m"])
    await eventually(lambda: rig.problems() == ())
    assert rig.worker.problems == ()
    need.missing = True
    rig.backend.notify_changed()
    await eventually(lambda: rig.state() is WorkerState.UNHEALTHY)
    assert rig.live() == []
    rig.worker.drain()
    assert rig.life is not None
    await rig.life
    await rig.submitter.close()
    await rig.dispatcher.close()


async def test_what_only_some_models_need_is_told_beside_them(rig: Rig, eventually: Eventually) -> None:
    """The worker is ready; a requirement that concerns none of its models is not mentioned."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.needs = (Need(optional=True, capabilities=(Capability.SPEECH,)),)
    rig.backend.problems = ("The model 'x' is not served: it lacks a part.",)
    rig.backend.notify_changed()
    await eventually(lambda: rig.problems() == rig.backend.problems)
    rig.backend.needs = (Need(optional=True, capabilities=(Capability.CHAT,)),)
    rig.backend.notify_changed()
    await eventually(lambda: len(rig.problems()) == 2)
    assert rig.state() is WorkerState.READY
    assert rig.worker.state == "ready"
    rig.backend.needs = rig.backend.problems = ()
    rig.backend.notify_changed()
    await eventually(lambda: rig.problems() == ())


async def test_a_backend_that_is_away_is_told_in_the_registry(rig: Rig, eventually: Eventually) -> None:
    """The registry holds the reason for which the worker is unhealthy."""
    await eventually(lambda: rig.live() == ["m"])
    rig.backend.up = False
    await eventually(lambda: rig.problems() == ("down",))
    rig.backend.up = True
    await eventually(lambda: rig.live() == ["m"] and rig.problems() == ())
