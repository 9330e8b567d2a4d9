"""A worker that lies about its name: the gateway goes on, nobody else is spoken to, and each request ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from urllib.parse import quote

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from backbone.registry.etcd_client import EtcdClient
from schemas.control import Control, ControlOp
from schemas.jobs import Capability
from schemas.presence import ModelOffer, WorkerPresence
from tests.cluster import Cluster, Recorded, chat
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="module")

DRAIN = Control(op=ControlOp.DRAIN).model_dump_json()
INJECTED = f"x 0\r\n\r\nPUB nexus.control.honest {len(DRAIN)}\r\n{DRAIN}\r\nPUB nexus.control.y"
NAMES = [INJECTED, "honest.", ".honest", "*", ">", "a b", "", "a\x00", "h\u00f6nest", "a" * 201]


class Thief:
    """A client of NATS that takes a job of `model` and answers its gateway as it likes."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self.heard: list[tuple[str, bytes]] = []

    async def listen(self) -> None:
        """Hear all that is said to workers."""

        async def hear(message: Msg) -> None:
            self.heard.append((message.subject, message.data))

        await self._client.subscribe("nexus.control.>", cb=hear)

    async def take(self) -> dict[str, str]:
        """The next job's envelope."""
        inbox = await self._client.subscribe(self._client.new_inbox())
        pull = f"$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.chat_default_{self._model}"
        for _ in range(200):  # its first job makes a queue
            await self._client.publish(pull, b'{"batch":1,"expires":20000000000}', reply=inbox.subject)
            message = await inbox.next_msg(timeout=30)
            if message.data:
                return dict(json.loads(message.data.partition(b"\n")[0]))
            await asyncio.sleep(0.05)
        raise AssertionError("no job comes")

    async def say(self, reply: str, frame: bytes) -> None:
        """An event of the job, as a question."""
        await self._client.publish(reply, frame, reply=self._client.new_inbox())
        await self._client.flush()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path_factory.mktemp("hostile"), **SETTINGS | {"WORKER_LEASE_S": "60"}) as cluster:
        await cluster.start_gateway()
        await cluster.start_worker(name="honest", WORKER_MODELS="theirs")
        await cluster.start_worker(name="taken", WORKER_MODELS="mine")
        cluster.workers["taken"].pause()
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def thief(cluster: Cluster) -> AsyncIterator[Thief]:
    client = await nats.connect(cluster.nats.url)
    thief = Thief(client, "mine")
    await thief.listen()
    yield thief
    await client.close()


async def _begin(cluster: Cluster, thief: Thief, name: str) -> Recorded:
    """A request that the thief takes, and claims to run under this name."""
    request = cluster.record(chat("anything", model="mine"))
    reply = (await thief.take())["reply"]
    await thief.say(reply, b"s 1 0\n" + json.dumps({"worker": name, "backend": "echo"}).encode())
    await thief.say(reply, b"c 1 7\nx")
    return await request.end(20)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
async def test_a_name_that_is_none_reaches_nobody(cluster: Cluster, thief: Thief, name: str) -> None:
    """The request ends in an error, no order goes out, and the other worker serves on."""
    thief.heard.clear()
    request = await _begin(cluster, thief, name)
    assert request.status == 502
    assert (await cluster.post("/v1/chat/completions", chat("hi", model="theirs"))).status_code == 200
    assert thief.heard == []
    assert "honest" in await cluster.listed()


async def test_an_honest_name_is_told_to_stop(cluster: Cluster, thief: Thief, eventually: Eventually) -> None:
    """So that the silence above is not that of a broken test."""
    thief.heard.clear()
    request = await _begin(cluster, thief, "somebody")
    assert request.status == 502
    await eventually(lambda: [subject for subject, _ in thief.heard] == ["nexus.control.somebody"])


@pytest.mark.parametrize("puback", [b"{", b"{}", b'{"seq":"x"}', b'{"error":1}'])
async def test_an_answer_that_cannot_be_read_ends_no_task(cluster: Cluster, thief: Thief, puback: bytes) -> None:
    """Bytes that look like JetStream's, on the address of a job: the gateway hears the next worker as before."""
    request = cluster.record(chat("anything", model="mine"))
    reply = (await thief.take())["reply"]
    for data in (puback, b"s x y\n", b"s 1 0\n{", b"\xff\xff 1 1\n", b"s 1 0\n" + b"[" * 10_000):
        await thief.say(reply, data)
    await request.end(20)
    assert (await cluster.post("/v1/chat/completions", chat("hi", model="theirs"))).status_code == 200


async def test_answers_go_to_inboxes_only(cluster: Cluster, thief: Thief, eventually: Eventually) -> None:
    """A question whose answer would be an order to a worker, or a call of JetStream, is not answered."""
    request = cluster.record(chat("anything", model="mine"))
    reply = (await thief.take())["reply"]
    thief.heard.clear()
    started = b"s 1 0\n" + json.dumps({"worker": "somebody", "backend": "echo"}).encode()
    client = thief._client
    for address in ("nexus.control.honest", "$JS.API.STREAM.PURGE.NEXUS_EVENTS"):
        await client.publish(reply, started, reply=address)
        await client.publish("nexus.ask.job_1", b"{}", reply=address)
    assert (await client.request(reply, started, timeout=5)).data == b"+"
    assert [subject for subject, _ in thief.heard] == []
    await thief.say(reply, b"c 1 7\nx")
    await request.end(20)
    # Its worker is told to stop, and the next test hears that if this one does not.
    await eventually(lambda: [subject for subject, _ in thief.heard] == ["nexus.control.somebody"])


@pytest.mark.parametrize("name", NAMES, ids=ascii)
async def test_presence_under_such_a_name_is_absent(
    cluster: Cluster, thief: Thief, name: str, eventually: Eventually
) -> None:
    """It is not listed, serves no model, and cannot be drained; a later one is seen."""
    link = EtcdClient(cluster.etcd.url, probe_key="/nexus/probe")
    offer = ModelOffer(name="ghosts", capabilities=(Capability.CHAT,))
    value = WorkerPresence(id="x", backend="echo", host="h", models=(offer,)).model_dump(mode="json") | {"id": name}
    thief.heard.clear()
    await link.open()
    try:
        key = f"/nexus/workers/{quote(name, safe='')}"
        await link.put(key, json.dumps(value).encode())
        real = WorkerPresence(id="seen", backend="echo", host="h").model_dump_json().encode()
        await link.put("/nexus/workers/seen", real)

        async def listed() -> bool:
            return "seen" in await cluster.listed()

        await eventually(listed)
        assert name not in await cluster.listed()
        assert (await cluster.post(f"/v1/workers/{quote(name, safe='')}/drain", {})).status_code in {404, 405}
        assert thief.heard == []
        await link.delete(key)
        await link.delete("/nexus/workers/seen")
    finally:
        await link.close()


async def test_what_was_refused_is_counted(cluster: Cluster, thief: Thief) -> None:
    """The first of a kind is in the log, all are in the metrics."""
    text = (await cluster.http.get(cluster.observability_url + "/metrics")).text
    counted = [line for line in text.splitlines() if line.startswith("nexus_bus_refused_total{")]
    assert any('kind="address"' in line for line in counted), counted
    said = [line for line in cluster.gateways[0].log_file.read_text().splitlines() if '"bus.refused"' in line]
    assert len(said) == len({json.loads(line)["kind"] for line in said}) >= 1
