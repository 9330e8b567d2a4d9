"""Webhooks as their receivers see them, and what the job says about them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
from standardwebhooks.webhooks import Webhook

from gateway.auth.authenticator import bootstrap_webhook_secret
from tests.cluster import KEY, Cluster, Crew, chat
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS
from tests.servers import here

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = bootstrap_webhook_secret(KEY)
RETRIES_S = "0.3,0.3,1,1,1,1,1,1,1"


@pytest.fixture(scope="module")
def cluster_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nothing else than where the receivers are may be told anything on this machine."""
    folder = tmp_path_factory.mktemp("ledger")
    prices = folder / "prices.toml"
    prices.write_text('currency = "usd"\n[[prices]]\nmodel = "*"\noutput_per_1m = 1000000\n')
    return SETTINGS | {
        "LEDGER_URL": f"sqlite:///{folder}/ledger.db",
        "LEDGER_PRICES_FILE": str(prices),
        "WEBHOOK_RETRIES_S": RETRIES_S,
        "WEBHOOK_TIMEOUT_S": "1",
        "WEBHOOK_PRIVATE_HOSTS": here(),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def opened_ledger(cluster: Cluster) -> None:
    """The gateway imports SQLAlchemy for its first event, which may take it longer than a webhook has."""
    assert (await cluster.get("/v1/usage")).status_code == 200


@dataclass(frozen=True, slots=True)
class Message:
    """What came."""

    path: str
    headers: dict[str, str]
    body: bytes

    def verified(self, secret: str = SECRET) -> Any:
        """Its body, once the official library has checked it."""
        return Webhook(secret).verify(self.body, self.headers)


class Receiver:
    """An HTTP server. `answers`: what it says to one message after the other, the last one again and again; None: nothing."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[bytes | None] = []
        self.got: list[Message] = []
        self._hang = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.got.append(Message(first.split(" ")[1], headers, body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await self._hang.wait()
        else:
            writer.write(answer)
        writer.close()

    def close(self) -> None:
        self._hang.set()


def says(status: str, *headers: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", "content-length: 0", "connection: close", *headers, "", "")).encode()


OK = says("204 No Content")
ERROR = says("500 Internal Server Error")


@asynccontextmanager
async def receiving(*answers: bytes | None, host: str = "") -> AsyncIterator[Receiver]:
    receiver, host = Receiver(), host or here()
    receiver.answers = list(answers)
    server = await asyncio.start_server(receiver.serve, host, 0)
    receiver.url = f"http://{host}:{server.sockets[0].getsockname()[1]}/nexus?for=me"
    try:
        yield receiver
    finally:
        receiver.close()
        server.close()
        await server.wait_closed()


Submit = Callable[..., Awaitable[str]]


@pytest_asyncio.fixture(loop_scope="module")
async def submit(cluster: Cluster, shared_crew: Crew) -> Submit:
    """Submits a chat job for a worker that is there, and gives its id."""

    async def submit(webhook: str, *, key: str = KEY, **fields: Any) -> str:
        body = {
            "endpoint": "/v1/chat/completions",
            "body": chat(model=shared_crew.model, **fields),
            "metadata": {"a": "b"},
        }
        headers = {"authorization": f"Bearer {key}"}
        answer = await cluster.post("/v1/jobs", body | {"webhook": {"url": webhook}}, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    return submit


async def webhook_of(cluster: Cluster, job: str) -> dict[str, Any]:
    answer = await cluster.get(f"/v1/jobs/{job}")
    assert answer.status_code == 200, answer.text
    webhook: dict[str, Any] = answer.json()["webhook"]
    return webhook


async def is_in(cluster: Cluster, job: str, state: str) -> dict[str, Any] | None:
    webhook = await webhook_of(cluster, job)
    return webhook if webhook["state"] == state else None


async def test_a_receiver_that_fails_twice(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """It is told a third time; every try can be verified, all are one message, and the job shows each of them."""
    async with receiving(ERROR, says("302 Found", "location: http://127.0.0.1:1/"), OK) as receiver:
        job = await submit(receiver.url)
        webhook = await eventually(lambda: is_in(cluster, job, "delivered"))
    assert [delivery["status"] for delivery in webhook["deliveries"]] == [500, 302, 204]
    assert [delivery["attempt"] for delivery in webhook["deliveries"]] == [1, 2, 3]
    said = [message.verified() for message in receiver.got]
    assert said == [said[0]] * 3
    assert {message.headers["webhook-id"] for message in receiver.got} == {f"evt_{job}_1"}
    assert {message.path for message in receiver.got} == {"/nexus?for=me"}
    assert said[0]["type"] == "job.completed"
    shown = (await cluster.get(f"/v1/jobs/{job}")).json()
    assert said[0]["data"] | {"webhook": None} == shown | {"webhook": None}
    assert said[0]["data"]["metadata"] == {"a": "b"}
    assert (await cluster.get(said[0]["data"]["result_url"])).json()["choices"][0]["message"][
        "content"
    ] == "hello there"
    assert b"hello there" not in receiver.got[0].body


async def test_each_end_is_told(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """Failure, with its reason, and cancellation."""
    async with receiving(OK) as receiver:
        failed = await submit(receiver.url, echo={"fail": "error"})
        await eventually(lambda: receiver.got)
        hanging = await submit(receiver.url, echo={"fail": "hang"})
        assert (await cluster.post(f"/v1/jobs/{hanging}/cancel", {})).json()["status"] == "cancelled"
        await eventually(lambda: len(receiver.got) == 2)
    first, second = (message.verified() for message in receiver.got)
    assert (first["type"], first["data"]["id"]) == ("job.failed", failed)
    assert first["data"]["error"]["code"] == "backend_error"
    assert (second["type"], second["data"]["id"]) == ("job.cancelled", hanging)


async def test_each_run_is_told(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """A job that is tried again ends again: another message, and the job shows what its new run was told."""
    async with receiving(OK) as receiver:
        job = await submit(receiver.url, echo={"fail": "error", "fail_times": 1})
        await eventually(lambda: is_in(cluster, job, "delivered"))
        assert (await cluster.post(f"/v1/jobs/{job}/retry", {})).status_code == 202
        await eventually(lambda: len(receiver.got) == 2)
    assert [message.headers["webhook-id"] for message in receiver.got] == [f"evt_{job}_1", f"evt_{job}_2"]
    assert [message.verified()["type"] for message in receiver.got] == ["job.failed", "job.completed"]


async def test_a_receiver_that_hangs(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """Its tries end in time and are made again; others are told meanwhile."""
    async with receiving(None, None, OK) as hanging, receiving(OK) as other:
        stuck = await submit(hanging.url)
        await eventually(lambda: hanging.got)
        told = await submit(other.url)
        await eventually(lambda: is_in(cluster, told, "delivered"))
        webhook = await eventually(lambda: is_in(cluster, stuck, "delivered"))
    assert [delivery["status"] for delivery in webhook["deliveries"]] == [None, None, 204]
    assert "did not answer within 1 s" in webhook["deliveries"][0]["error"]


async def test_keys_have_secrets_of_their_own(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """What one key's jobs are signed with verifies nothing of another's."""
    new = (await cluster.post("/v1/keys", {"name": "hooked"})).json()
    async with receiving(OK) as receiver:
        await submit(receiver.url, key=new["key"])
        await eventually(lambda: receiver.got)
    assert receiver.got[0].verified(new["webhook_secret"])["type"] == "job.completed"
    with pytest.raises(Exception, match="signature"):
        receiver.got[0].verified()


async def test_a_redirect_to_what_only_the_gateway_can_reach(
    cluster: Cluster, submit: Submit, eventually: Eventually
) -> None:
    """Is not followed, whatever kind it is; neither is a host that is not allowed told anything by itself."""
    async with receiving(OK, host="127.0.0.2") as secret:
        redirects = [says(f"{status} Elsewhere", f"location: {secret.url}") for status in (301, 302, 303, 307, 308)]
        async with receiving(*redirects, OK) as receiver:
            job = await submit(receiver.url)
            webhook = await eventually(lambda: is_in(cluster, job, "delivered"), timeout_s=30)
        answer = await cluster.post(
            "/v1/jobs",
            {"endpoint": "/v1/chat/completions", "body": chat(), "webhook": {"url": secret.url}},
        )
    assert [delivery["status"] for delivery in webhook["deliveries"]] == [301, 302, 303, 307, 308, 204]
    assert secret.got == []
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "webhook.url"


async def test_redis_away_between_two_tries(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """The next tries are made all the same, and the job shows them once Redis is back."""
    async with receiving(ERROR) as receiver:
        job = await submit(receiver.url)
        await eventually(lambda: receiver.got)
        cluster.redis.pause()
        try:
            before = len(receiver.got)
            await eventually(lambda: len(receiver.got) > before)
            receiver.answers = [OK]
            count = len(receiver.got) + 1
            await eventually(lambda: len(receiver.got) == count)
        finally:
            cluster.redis.resume()
        webhook = await eventually(lambda: is_in(cluster, job, "delivered"))
    assert [delivery["status"] for delivery in webhook["deliveries"]] == [500] * (count - 1) + [204]


async def test_a_gateway_killed_between_two_tries(cluster: Cluster, submit: Submit, eventually: Eventually) -> None:
    """Its successor makes the next one, of the same message, and counts on; so it is where NATS restarts too."""
    async with receiving(ERROR) as receiver:
        job = await submit(receiver.url)
        await eventually(lambda: len(receiver.got) >= 2)
        gateway = cluster.gateways[0]
        gateway.kill()
        await gateway.wait()
        receiver.answers, before = [OK], len(receiver.got)
        cluster.nats.kill()
        await cluster.nats.process.wait()
        await cluster.nats.restart()
        await gateway.start()
        webhook = await eventually(lambda: told(cluster, job), timeout_s=60)
    attempts = [delivery["attempt"] for delivery in webhook["deliveries"]]
    assert attempts[-1] > before
    assert attempts == sorted(set(attempts))
    assert len({message.body for message in receiver.got}) == 1
    assert {message.headers["webhook-id"] for message in receiver.got} == {f"evt_{job}_1"}
    assert receiver.got[-1].verified()["data"]["id"] == job


async def told(cluster: Cluster, job: str) -> dict[str, Any] | None:
    """`delivered`, from a gateway that may be starting."""
    try:
        answer = await cluster.get(f"/v1/jobs/{job}")
    except httpx.HTTPError:
        return None
    if answer.status_code != 200:
        return None
    webhook: dict[str, Any] = answer.json()["webhook"]
    return webhook if webhook["state"] == "delivered" else None


async def test_a_budget_warns_ends_and_is_raised(cluster: Cluster, shared_crew: Crew, eventually: Eventually) -> None:
    """What requests and jobs use is counted, announced and refused, and agrees with the ledger; a change holds at once."""
    async with receiving(OK) as receiver:
        month, cost = ({"unit": unit, "amount": 1000, "period": "month"} for unit in ("tokens", "cost"))
        made = await cluster.post("/v1/teams", {"id": "spenders", "budgets": [month | {"warn_at": 0.001}, cost]})
        assert made.status_code == 201, made.text
        team = f"{cluster.url}/v1/teams/spenders"
        refused = await cluster.http.patch(team, json={"budget_webhook": "http://169.254.169.254/"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "budget_webhook")
        secret = (await cluster.http.patch(team, json={"budget_webhook": receiver.url})).json()["webhook_secret"]
        key = (await cluster.post("/v1/keys", {"name": "spender", "owner": "spenders"})).json()
        bearer = {"authorization": f"Bearer {key['key']}"}
        body = chat("one two three", model=shared_crew.model)
        answers = [await cluster.post("/v1/chat/completions", body, headers=bearer)]
        job = await cluster.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body}, headers=bearer)
        assert job.status_code == 202, job.text
        ended = await cluster.get(f"/v1/jobs/{job.json()['id']}?wait=60", headers=bearer)
        stream = await cluster.post(
            "/v1/chat/completions",
            body | {"stream": True, "stream_options": {"include_usage": True}},
            headers=bearer,
        )
        assert [answer.status_code for answer in (*answers, stream)] == [200, 200]
        usage = [answers[0].json()["usage"], ended.json()["usage"]]
        used = 3 * usage[0]["total_tokens"]
        assert usage[0]["total_tokens"] == usage[1]["total_tokens"]

        async def spent() -> dict[str, Any] | None:
            found = (await cluster.get("/v1/budgets", headers=bearer)).json()["data"]
            by_unit = {one["unit"]: one for one in found}
            return by_unit if by_unit["tokens"]["spent"] == used else None

        shown = await eventually(spent)
        assert shown["tokens"]["spent"] + shown["tokens"]["reserved"] + shown["tokens"]["left"] == 1000
        assert shown["cost"]["spent"] == 3 * usage[0]["completion_tokens"]
        assert shown["cost"]["currency"] == "usd"
        listed = (await cluster.http.get(team)).json()["budget_usage"]
        assert [one["renews_at"] for one in listed] == [one["renews_at"] for one in shown.values()]

        async def recorded() -> bool:
            [row] = (await cluster.get("/v1/usage", headers=bearer)).json()["data"] or [{"requests": 0}]
            return row["requests"] == 3 and row["input_tokens"] + row["output_tokens"] == used

        await eventually(recorded)
        await eventually(lambda: receiver.got)
        warning = receiver.got[0].verified(secret)
        assert (warning["type"], warning["data"]["holder_id"]) == ("budget.warning", "spenders")
        await cluster.http.patch(team, json={"budgets": [month | {"amount": used}]})
        for path, wanted in (
            ("/v1/chat/completions", body),
            ("/v1/chat/completions", body | {"stream": True}),
            ("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body}),
            ("/v1/batches", {"endpoint": "/v1/chat/completions", "input_file_id": "x", "completion_window": "24h"}),
        ):
            refused = await cluster.post(path, wanted, headers=bearer)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota"), refused.text
            assert refused.headers["x-should-retry"] == "false"
        await eventually(lambda: len(receiver.got) >= 2)
        assert receiver.got[-1].verified(secret)["type"] == "budget.exhausted"
        await cluster.http.patch(team, json={"budgets": []})
        assert (await cluster.post("/v1/chat/completions", body, headers=bearer)).status_code == 200
