"""Accounts in NATS: whatever address a worker names for an answer, the answer stays in the worker's own account.

JetStream answers with the server's rights, and a gateway with its own: by an address of its choice, a worker could publish where it
may not. Here each kind of answer is redirected to each place that would do harm.
"""

from __future__ import annotations

import asyncio
import json
import secrets as random
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from backbone.bus.nats.permissions import REPLY_ROUTE_S
from schemas.control import Control, ControlOp
from schemas.frames import STOP, FrameKind
from schemas.job_events import GateRequest
from tests.cluster import chat
from tests.conftest import Eventually
from tests.deploy.production import ProductionNats, Secrets, worker_block
from tests.deploy.secured import MODEL, OTHERS, World
from workers.demand import LINGER_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONSUMER = "chat_default_org_2fmodel_3a8b"
PULL = f"$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.{CONSUMER}"
NO_WAIT = b'{"batch":1,"no_wait":true}'
LONG_PULL_S = 10.0
"""As long as workers of earlier versions pulled."""
THIRD = "nexus.jobs.chat.default.third"
BLOB = "$JS.API.DIRECT.GET.OBJ_nexus-blobs."
DRAIN = Control(op=ControlOp.DRAIN).model_dump_json().encode()
ASK = GateRequest(
    kind=FrameKind.STARTED, job="job_asked", run=1, delivery=1, token="t", owner="alice", worker="gpu1"
).model_dump_json()
HARM = {
    "order another worker": "nexus.control.gpu2",
    "forge a job of another model": f"nexus.jobs.chat.default.{OTHERS}",
    "forge a webhook": "nexus.hooks.forged-1",
    "forge a batch": "nexus.batches.forged",
    "forge a claim": "$KV.nexus-idempotency." + "a" * 64,
    "forge a dead letter of another model": f"nexus.dlq.chat.{OTHERS}",
    "purge a stream": "$JS.API.STREAM.PURGE.NEXUS_EVENTS",
    "delete a stream": "$JS.API.STREAM.DELETE.NEXUS_EVENTS",
    "delete a message": "$JS.API.STREAM.MSG.DELETE.NEXUS_DONE",
    "make a consumer": "$JS.API.CONSUMER.DURABLE.CREATE.NEXUS_DONE.forged",
    "delete a consumer": "$JS.API.CONSUMER.DELETE.NEXUS_DONE.recorder",
    "pull for another model": f"$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.chat_default_{OTHERS}",
    "tell gateways of keys": "nexus.notice.forged",
    "tell followers of events": "nexus.told.forged",
    "tell waiters of an end": "nexus.ended.forged",
    "wake another model's workers": f"nexus.bell.chat.default.{OTHERS}",
    "answer a gateway": "_INBOX.gateway.forged",
    "answer another worker": "_INBOX.gpu2.forged",
    "answer the administrator": "_INBOX.admin.forged",
    "answer by a mapped address": "_R_.abcdef.ghijkl",
}
GATEWAY: list[str] = []
"""Before the token in the address for replies of the gateway that runs."""
Redirect = Callable[[Client, str], Awaitable[None]]


async def _blob(client: Client, to: str) -> None:
    """A message whose content the worker chose."""
    subject = f"$O.nexus-blobs.C.gpu1.{random.token_hex(16)}.0"
    await client.request(subject, DRAIN, timeout=5)
    await client.publish(BLOB + subject, b"", reply=to)
    assert (await client.request(BLOB + subject, b"", timeout=5)).data == DRAIN


async def _empty_pull(client: Client, to: str) -> None:
    """A status without content: to PURGE, a request to purge everything."""
    inbox = await client.subscribe(client.new_inbox())
    for reply in (to, inbox.subject):
        await client.publish(PULL, NO_WAIT, reply=reply)
    await inbox.next_msg(timeout=5)
    await inbox.unsubscribe()


async def _confirmation(client: Client, to: str) -> None:
    """JetStream's confirmation of an event."""
    await client.publish("nexus.events.job_forged", b"x", reply=to)
    await client.request("nexus.events.job_forged", b"x", timeout=5)


async def _gateway(client: Client, to: str) -> None:
    """A gateway's answer to a question about a durable job, and to one about a job that it does not know any more."""
    await client.publish("nexus.ask.job_asked", ASK.encode(), reply=to)
    await client.publish(f"{GATEWAY[0]}.over", b"h 1 1\n", reply=to)
    assert (await client.request(f"{GATEWAY[0]}.over", b"h 1 1\n", timeout=5)).data == STOP


async def _nobody(client: Client, to: str) -> None:
    """The server's own word that nobody listens."""
    await client.publish("nexus.reply.nobody.x", b"x", reply=to)
    await client.flush()


async def _trace(client: Client, to: str) -> None:
    """The server's trace of a message."""
    await client.publish("nexus.events.job_forged", b"x", headers={"Nats-Trace-Dest": to})
    await client.request("nexus.events.job_forged", b"x", timeout=5)


REDIRECTS: dict[str, Redirect] = {
    "what is stored": _blob,
    "the status of a pull": _empty_pull,
    "a confirmation": _confirmation,
    "a gateway's answer": _gateway,
    "job.no_responders": _nobody,
    "a trace": _trace,
}


@dataclass
class Spy:
    """The administrator, who hears everything in the account NEXUS."""

    client: Client
    heard: list[str] = field(default_factory=list)

    async def saw(self, subject: str) -> bool:
        """Whether anything has come there since the last time."""
        for _ in range(2):
            await self.client.flush()
        found = subject in self.heard
        self.heard.clear()
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spy(world: World) -> AsyncIterator[Spy]:
    spy = Spy(await world.user("admin", "admin/nats-password"))

    async def hear(message: Msg) -> None:
        spy.heard.append(message.subject)

    await spy.client.subscribe(">", cb=hear)
    await spy.client.flush()
    await world.cluster.post("/v1/chat/completions", chat("hi", model=MODEL))
    for _ in range(2):
        await spy.client.flush()
    GATEWAY[:] = {one.rpartition(".")[0] for one in spy.heard if one.startswith("nexus.reply.")}
    assert len(GATEWAY) == 1
    yield spy
    await spy.client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(world: World) -> AsyncIterator[Client]:
    """Somebody with the credentials of worker `gpu1`."""
    client = await world.user("gpu1", "worker-gpu1/nats-password")
    yield client
    await client.close()


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("kind", REDIRECTS)
async def test_no_answer_leaves_the_account(spy: Spy, worker: Client, kind: str, harm: str) -> None:
    """Each kind of answer, to each place where a worker may not publish."""
    await REDIRECTS[kind](worker, HARM[harm])
    assert not await spy.saw(HARM[harm])


@pytest.mark.parametrize("harm", HARM)
async def test_no_answer_to_a_worker_for_all_queues_leaves_its_account(world: World, spy: Spy, harm: str) -> None:
    """The user `worker` serves every model, and publishes no more than another one."""
    client = await world.user("worker", "worker/nats-password")
    allowed = {"pull for another model", "forge a dead letter of another model"}
    for kind, redirect in REDIRECTS.items():
        await redirect(client, HARM[harm])
        assert not await spy.saw(HARM[harm]) or harm in allowed, kind
    await client.close()


@pytest.mark.parametrize("harm", HARM)
async def test_no_answer_to_a_monitor_leaves_its_account(world: World, spy: Spy, harm: str) -> None:
    """A monitor asks JetStream for depths: the answer would purge a stream as well."""
    client = await world.user("monitor", "monitor/nats-password")
    await client.publish("$JS.API.STREAM.INFO.NEXUS_JOBS", b"", reply=HARM[harm])
    assert b"stream_info" in (await client.request("$JS.API.STREAM.INFO.NEXUS_JOBS", b"")).data
    assert not await spy.saw(HARM[harm])
    await client.close()


async def test_the_spy_hears_what_a_worker_may_say(spy: Spy, worker: Client) -> None:
    """So that its silence above says something."""
    for subject in ("nexus.ask.job_1", "nexus.reply.gateway.token", "nexus.events.job_1", "nexus.done.job_1"):
        await worker.publish(subject, b"x")
        await worker.flush()
        assert await spy.saw(subject)
    await worker.publish(PULL, NO_WAIT, reply="_INBOX.gpu1.x")
    await worker.flush()
    assert await spy.saw(PULL)


async def test_a_worker_hears_nothing_of_another_account(
    world: World, spy: Spy, worker: Client, eventually: Eventually
) -> None:
    """Orders to another worker, its wake-up notifications and its inbox stay away, also from the same subject here."""
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        heard.append(message.subject)

    for subject in ("nexus.control.gpu1", "_INBOX.gpu1.y"):
        await worker.subscribe(subject, cb=hear)
    await worker.flush()

    async def said_and_heard() -> bool:
        """NATS keeps their order: once the last is there, the others are not to come."""
        for subject in (
            "nexus.control.gpu2",
            f"nexus.bell.chat.default.{OTHERS}",
            "_INBOX.gpu1.y",
            "nexus.control.gpu1",
        ):
            await spy.client.publish(subject, b"{}")
        await spy.client.flush()
        await worker.flush()
        return bool(heard)

    await eventually(said_and_heard)
    assert set(heard) == {"nexus.control.gpu1"}


async def test_everything_is_there_afterwards(world: World) -> None:
    """Both workers serve, and every stream is there."""
    for model in (MODEL, OTHERS):
        assert (await world.cluster.post("/v1/chat/completions", chat("hi", model=model))).status_code == 200
    assert sorted(await world.cluster.listed()) == ["gpu1", "gpu2"]


# What workers rely on


async def _add(world: World, name: str, model: str) -> Client:
    """A new worker's user, taken by the running server."""
    worker_block(world.secrets.folder, name, "--model", model)
    world.secrets.make("--worker", name)
    world.nats.reload()
    for _ in range(100):
        try:
            return await world.user(name, f"worker-{name}/nats-password")
        except Exception:
            await asyncio.sleep(0.05)
    raise AssertionError(f"{name} is not let in")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def third(world: World, spy: Spy) -> AsyncIterator[Client]:
    """A worker's user for a model that no process serves: what it pulls is its own."""
    wanted = {
        "durable_name": "chat_default_third",
        "filter_subject": THIRD,
        "ack_policy": "explicit",
        "ack_wait": 3600_000_000_000,
    }
    body = json.dumps({"stream_name": "NEXUS_JOBS", "config": wanted}).encode()
    made = await spy.client.request("$JS.API.CONSUMER.DURABLE.CREATE.NEXUS_JOBS.chat_default_third", body)
    assert "error" not in json.loads(made.data), made.data
    client = await _add(world, "gpu3", "third")
    await spy.client.jetstream().publish(THIRD, b"held")  # gateways free a queue that is empty and that nobody serves
    assert (await (await _pull(client, 1, 5)).next_msg(timeout=5)).data == b"held"
    yield client
    await client.close()


async def _pull(client: Client, batch: int, seconds: float) -> Subscription:
    """Open a pull for the third model's jobs; what it brings."""
    inbox = await client.subscribe(client.new_inbox())
    request = b'{"batch":%d,"expires":%d}' % (batch, int(seconds * 1_000_000_000))
    await client.publish("$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.chat_default_third", request, reply=inbox.subject)
    for _ in range(2):
        await client.flush()
    return inbox


async def test_a_job_comes_at_the_end_of_a_long_pull(spy: Spy, third: Client) -> None:
    """nats-server keeps the way back for longer than a worker's pull lasts, and lets the worker acknowledge what came."""
    assert LINGER_S < LONG_PULL_S < REPLY_ROUTE_S
    inbox = await _pull(third, 2, LONG_PULL_S)
    await asyncio.sleep(LONG_PULL_S - 2)
    await spy.client.jetstream().publish(THIRD, b"late")
    job = await inbox.next_msg(timeout=5)
    assert (job.subject, job.data) == (THIRD, b"late")
    await third.request(job.reply, b"+ACK", timeout=5)
    status = await inbox.next_msg(timeout=5)
    assert (status.headers or {}).get("Status") == "408"
    info = await spy.client.jetstream().consumer_info("NEXUS_JOBS", "chat_default_third")
    assert (info.num_ack_pending, info.num_pending) == (1, 0)  # the one that is held


def _ways_back(nats: ProductionNats) -> int:
    url = f"http://127.0.0.1:{nats.monitor_port}/accountz?acc=NEXUS"
    with urllib.request.urlopen(url) as answer:
        return len(json.load(answer)["account_detail"].get("responses") or {})


async def test_ways_back_are_forgotten(world: World, worker: Client) -> None:
    """Thousands of pulls leave nothing behind in nats-server."""
    inbox = f"{worker.new_inbox()}"
    await worker.subscribe(f"{inbox}.*", cb=_ignore)
    before = _ways_back(world.nats)
    for number in range(3000):
        await worker.publish(PULL, NO_WAIT, reply=f"{inbox}.{number % 10}")
    for _ in range(2):
        await worker.flush()
    most = _ways_back(world.nats)
    assert most >= before + 2000
    for _ in range(4 * REPLY_ROUTE_S):
        if _ways_back(world.nats) < before + 1000:
            return
        await asyncio.sleep(1)
    raise AssertionError(f"{_ways_back(world.nats)} of {most} are still there, before that {before}")


async def _ignore(_: Msg) -> None:
    """Nothing to do."""


async def test_a_new_worker_comes_by_a_reload(world: World, spy: Spy, third: Client) -> None:
    """The server takes its account at a signal; connections stay, and a pull that was open brings its job."""
    inbox = await _pull(third, 1, 30)
    await (await _add(world, "gpu4", "fourth")).close()
    await spy.client.jetstream().publish(THIRD, b"over a reload")
    job = await inbox.next_msg(timeout=5)
    assert job.data == b"over a reload"
    await third.request(job.reply, b"+ACK", timeout=5)


async def test_an_installation_moves_by_a_restart(tmp_path: Path) -> None:
    """What one account held before workers had their own is there afterwards."""
    secrets = Secrets(tmp_path / "secrets")
    secrets.make()
    server = ProductionNats(tmp_path / "nats", secrets)
    accounts = secrets.folder / "nats" / "accounts.conf"
    new = accounts.read_text()
    password = secrets.text("gateway/nats-password")
    accounts.write_text(
        "accounts {\n  NEXUS {\n    jetstream: enabled\n"
        f'    users: [ {{ user: gateway, password: "{password}" }} ]\n  }}\n  SYS {{}}\n}}\n'
    )
    await server.start()
    world = World.__new__(World)
    world.secrets = secrets
    world.cluster = type("Old", (), {"nats": server})()
    client = await world.user("gateway", "gateway/nats-password")
    wanted = {"name": "NEXUS_EVENTS", "subjects": ["nexus.events.>"], "storage": "file", "allow_direct": True}
    await client.request("$JS.API.STREAM.CREATE.NEXUS_EVENTS", json.dumps(wanted).encode())
    await client.request("nexus.events.job_1", b"before")
    await client.close()
    accounts.write_text(new)
    await server.stop()
    await server.start()
    client = await world.user("gateway", "gateway/nats-password")
    there = await client.request("$JS.API.DIRECT.GET.NEXUS_EVENTS.nexus.events.job_1", b"")
    assert there.data == b"before"
    await client.close()
    await server.stop()
