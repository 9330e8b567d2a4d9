"""Inference servers that ask to wait, that load their model, and that have just died while another one is well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.backends.doubles.openai import OpenAIDouble, ReceivedRequest, send_answer
from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.faults.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMPATIENT = {"QUEUE_TIMEOUT_S": "3"}
SLACK_S = 15.0
"""What a busy machine with two cores may add to a bound of the contract."""
Answer = tuple[int, Any, dict[str, str]]
BUSY: Answer = (503, {"error": {"message": "overloaded", "type": "server_error"}}, {"retry-after": "3"})
LIMITED: Answer = (429, {"error": {"message": "slow down", "type": "rate_limit_error"}}, {"retry-after": "3"})
LOADING: Answer = (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, {})
WAITS_S = {"busy": 3.0, "limited": 3.0, "loading": 2.0}


class Server(OpenAIDouble):
    """Answers posts for `model` by `refuse`, as long as that returns something; notes when each came."""

    def __init__(self, *models: str) -> None:
        super().__init__()
        self.models = models
        self.refuse: Callable[[str], Answer | None] = lambda model: None
        self.came: dict[str, list[float]] = {model: [] for model in models}
        self.listing(*models)

    def listing(self, *models: str, **changes: Any) -> None:
        entries = tuple({"id": name, "object": "model", "created": 7, "owned_by": "tests"} for name in models)
        self.behave(models=entries, **changes)

    async def _post(self, seen: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        model = seen.json["model"]
        self.came[model].append(asyncio.get_running_loop().time())
        answer = self.refuse(model)
        return await (send_answer(writer, *answer) if answer is not None else super()._post(seen, reader, writer))

    def refuse_once(self, answer: Answer) -> None:
        answers = [answer]
        self.refuse = lambda _: answers.pop() if answers else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path_factory.mktemp("waits"), **SETTINGS) as cluster:
        await cluster.start_gateway()
        await cluster.start_gateway(**IMPATIENT)
        yield cluster


async def serve(crew: Crew, server: Server, **settings: Any) -> str:
    """A worker in front of it."""
    models = ",".join(server.models)
    return await crew.start(backend="openai", WORKER_BACKEND_URL=server.url, WORKER_MODELS=models, **settings)


async def pauses(cluster: Cluster, worker: str) -> list[dict[str, Any]]:
    workers = (await cluster.get("/v1/workers")).json()["data"]
    return next(row["pauses"] for row in workers if row["id"] == worker)


@pytest.mark.parametrize("kind", WAITS_S)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_server_that_asks_to_wait_is_left_alone_so_long(crew: Crew, kind: str, stream: bool) -> None:
    """The caller sees a delay and then the answer; the server is asked again once the time is over, and not before."""
    async with Server(crew.model) as server:
        await serve(crew, server)
        server.refuse_once({"busy": BUSY, "limited": LIMITED, "loading": LOADING}[kind])
        answer = await crew.ask(stream=stream).end()
        assert (answer.status, answer.error) == (200, None)
        first, second = server.came[crew.model]
        assert WAITS_S[kind] - 0.1 <= second - first <= WAITS_S[kind] + SLACK_S


async def test_waiting_does_not_use_up_the_tries_of_a_job(crew: Crew, cluster: Cluster) -> None:
    """A durable job outlasts more refusals than it has tries, and its record counts one attempt."""
    async with Server(crew.model) as server:
        await serve(crew, server)
        answers = [(503, {"error": "busy"}, {"retry-after": "1"})] * 5
        server.refuse = lambda _: answers.pop() if answers else None
        body = {"endpoint": "/v1/chat/completions", "body": chat(model=crew.model)}
        job = (await cluster.post("/v1/jobs", body)).json()
        done = (await cluster.get(f"/v1/jobs/{job['id']}?wait=60")).json()
        assert (done["status"], done["attempts"]) == ("completed", 1), done
        came = server.came[crew.model]
        assert len(came) == 6
        assert min(after - before for before, after in pairwise(came)) >= 0.9


async def test_other_models_go_on_and_the_pause_is_shown(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """While one model waits, no further job of it reaches the server, and its neighbor is served at once."""
    async with Server(crew.model, f"{crew.model}-2") as server:
        worker = await serve(crew, server)
        server.refuse = lambda model: (429, {"error": "slow"}, {"retry-after": "20"}) if model == crew.model else None
        waiting = [crew.ask() for _ in range(4)]

        async def shown() -> bool:
            return [pause["model"] for pause in await pauses(cluster, worker)] == [crew.model]

        await eventually(shown)
        asked = len(server.came[crew.model])
        assert asked <= 4
        other = await crew.ask(model=f"{crew.model}-2").end(timeout_s=10)
        assert other.status == 200
        [pause] = await pauses(cluster, worker)
        assert 19 <= pause["seconds"] <= 20
        late = crew.ask()

        async def is_stored(count: int) -> bool:
            return await cluster.stored(crew.model) == count

        await eventually(lambda: is_stored(5))
        assert len(server.came[crew.model]) == asked, "the paused queue is left alone"
        for answer in (*waiting, late):
            await answer.hang_up()


async def test_another_worker_takes_the_job_at_once(crew: Crew, eventually: Eventually) -> None:
    """One server asks for ten minutes; the other one answers everything without a delay of that kind."""
    async with Server(crew.model) as busy, Server(crew.model) as well:
        busy.refuse = lambda _: (503, {"error": "busy"}, {"retry-after": "600"})
        await serve(crew, busy)
        await serve(crew, well)
        asked = 0
        while not asked:
            answers = [crew.ask(stream=bool(number % 2)) for number in range(20)]
            await asyncio.gather(*(answer.end() for answer in answers))
            assert [answer.status for answer in answers] == [200] * 20
            assert max(answer.seconds for answer in answers) < SLACK_S
            asked = len(busy.came[crew.model])
        assert asked <= int(SETTINGS["WORKER_CONCURRENCY"]), "no more than were in its worker's hands"
        answers = [crew.ask() for _ in range(40)]
        await asyncio.gather(*(answer.end() for answer in answers))
        assert [answer.status for answer in answers] == [200] * 40
        assert len(busy.came[crew.model]) == asked


async def test_a_pause_that_outlasts_the_limit_is_said_at_once(
    crew: Crew, cluster: Cluster, eventually: Eventually
) -> None:
    """Whether it waits already or comes later, the caller gets 503 with the true `Retry-After`, and not a time-out."""
    async with Server(crew.model) as server:
        server.refuse = lambda _: (503, {"error": "busy"}, {"retry-after": "100"})
        worker = await serve(crew, server)
        impatient = cluster.urls[1]

        async def known() -> bool:
            models = (await cluster.http.get(f"{impatient}/v1/models")).json()["data"]
            return any(model["id"] == crew.model for model in models)

        await eventually(known)
        first = await crew.ask(url=impatient).end()
        assert first.seconds < 3 + SLACK_S
        await eventually(lambda: pauses(cluster, worker))
        second = await crew.ask(url=impatient).end()
        assert second.seconds < SLACK_S
        for answer in (first, second):
            assert answer.headers is not None
            assert (answer.status, (answer.error or {}).get("code")) == (503, "backend_unavailable")
            assert 50 < int(answer.headers["retry-after"]) <= 100
        assert len(server.came[crew.model]) == 1


async def test_a_server_that_has_just_died_costs_no_tries(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Its worker leaves the queue at the first refused connection, and every request is answered by the other one."""
    async with Server(crew.model) as dying, Server(crew.model) as well:
        first = await serve(crew, dying, WORKER_HEALTH_INTERVAL_S="60")
        await serve(crew, well, WORKER_HEALTH_INTERVAL_S="60")
        warm = [crew.ask() for _ in range(16)]
        await asyncio.gather(*(answer.end() for answer in warm))
        await dying.kill()
        answers = [crew.ask(stream=bool(number % 2)) for number in range(100)]
        await asyncio.gather(*(answer.end() for answer in answers))
        assert [(answer.status, answer.error) for answer in answers] == [(200, None)] * 100
        await cluster.wait_for_worker(first, "unhealthy", timeout_s=5 + SLACK_S)
        returned = [one for one in cluster.attempts(first) if one["outcome"] == "returned"]
        assert len(returned) <= int(SETTINGS["WORKER_CONCURRENCY"]), "no more than were in its hands"


async def test_a_server_that_dies_under_load_fails_nobody(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Whole answers under way at its death come from the other server, and so does everything that follows."""
    async with Server(crew.model) as dying, Server(crew.model) as well:
        for server in (dying, well):
            server.listing(crew.model, token_delay_s=0.02)
            await serve(crew, server, WORKER_HEALTH_INTERVAL_S="60")
        answers = [crew.ask() for _ in range(300)]
        await eventually(lambda: sum(answer.ended for answer in answers) >= 60)
        await dying.kill()
        await asyncio.gather(*(answer.end() for answer in answers))
        failed = [(answer.status, answer.error) for answer in answers if answer.status != 200]
        assert failed == []


async def test_a_dead_server_without_another_one(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Requests wait for it to come back, within their limits; a durable job, too.

    Both are in the queue before it dies, since the server asks to wait: once it is known to be dead, requests are refused.
    """
    async with Server(crew.model) as server:
        worker = await serve(crew, server, WORKER_HEALTH_INTERVAL_S="60")
        assert (await crew.ask().end()).status == 200
        server.refuse_once(BUSY)
        answer = crew.ask()
        await eventually(lambda: len(server.came[crew.model]) == 2)
        body = {"endpoint": "/v1/chat/completions", "body": chat(model=crew.model)}
        job = (await cluster.post("/v1/jobs", body)).json()
        await server.kill()
        await cluster.wait_for_worker(worker, "unhealthy", timeout_s=WAITS_S["busy"] + 5 + SLACK_S)
        assert not answer.ended
        await server.start()
        assert ((await answer.end()).status, answer.broken) == (200, None)
        done = (await cluster.get(f"/v1/jobs/{job['id']}?wait=60")).json()
        assert (done["status"], done["attempts"]) == ("completed", 1), done


async def test_a_server_that_stays_dead_is_a_clear_503(crew: Crew, cluster: Cluster) -> None:
    """No live worker for 30 s, and the caller is told."""
    async with Server(crew.model) as server:
        await serve(crew, server)
        await server.kill()
        answer = await crew.ask().end(timeout_s=30 + SLACK_S)
        assert (answer.status, (answer.error or {}).get("code")) == (503, "unavailable")
        assert isinstance(answer.headers, httpx.Headers)
        assert int(answer.headers["retry-after"]) >= 1
