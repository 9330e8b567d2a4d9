"""How work is shared: among workers, models and lanes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import Cluster, Crew, Recorded, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def ask_many(ask: Callable[[], Recorded], count: int, concurrency: int) -> None:
    """`count` requests, `concurrency` at once; each must succeed."""
    left = iter(range(count))

    async def one_after_another() -> None:
        for _ in left:
            answer = await ask().end()
            assert answer.status == 200, answer.body

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))


async def shares(crew: Crew, eventually: Eventually, total: int) -> list[int]:
    """How many attempts each worker has completed, once they add up."""

    def counts() -> list[int]:
        return [len(crew.cluster.attempts(name)) for name in crew.names]

    await eventually(lambda: sum(counts()) == total)
    return counts()


@pytest.mark.parametrize(("slots", "least"), [(2, 40), (32, 20)], ids=["careful", "wide"])
async def test_three_workers_share_a_model(crew: Crew, eventually: Eventually, slots: int, least: int) -> None:
    """Three workers of one model each take a part: with few slots a fair one; with more than callers, none goes without."""
    await crew.start_all("delay_ms=10", "delay_ms=10", "delay_ms=10", WORKER_CONCURRENCY=str(slots))
    await ask_many(crew.ask, 300, 24)
    taken = await shares(crew, eventually, 300)
    assert min(taken) >= least, taken


@pytest.mark.parametrize("slots", [3, 26], ids=["careful", "wide"])
async def test_slots_are_never_exceeded(crew: Crew, eventually: Eventually, slots: int) -> None:
    """However many ask at once, a worker runs as many jobs as it has slots; the others wait, and all are answered."""
    async with OpenAIDouble() as double:
        hold = asyncio.Event()
        double.behave(models=({"id": crew.model, "object": "model", "created": 7, "owned_by": "tests"},), hold=hold)
        await crew.start(backend="openai", WORKER_BACKEND_URL=double.url, WORKER_CONCURRENCY=str(slots))
        answers = [crew.ask(stream=bool(number % 2)) for number in range(3 * slots)]
        # With many slots, one stays asked for on each quiet queue: two capabilities in three lanes, less the busy one.
        least = slots - (5 if slots > 24 else 0)
        await eventually(lambda: double.streaming >= least)
        most = double.streaming
        asyncio.get_running_loop().call_later(0.3, hold.set)
        while not all(answer.ended for answer in answers):
            most = max(most, double.streaming)
            await asyncio.sleep(0.005)
    assert most <= slots
    assert [answer.status for answer in answers] == [200] * 3 * slots


async def test_a_new_worker_takes_its_share(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A worker that starts while others are busy is at work within seconds, and nothing else changes."""
    await crew.start_all("delay_ms=100", "delay_ms=100", WORKER_CONCURRENCY="1")
    async with under_load(crew, 8):
        await eventually(lambda: all(cluster.attempts(name) for name in crew.names))
        new = await crew.start(options="delay_ms=100", WORKER_CONCURRENCY="1")
        await eventually(lambda: len(cluster.attempts(new)) >= 5, timeout_s=30)


@asynccontextmanager
async def under_load(crew: Crew, concurrency: int) -> AsyncIterator[None]:
    stopping = False

    async def ask() -> None:
        while not stopping:
            assert (await crew.ask().end()).status == 200

    asks = [asyncio.create_task(ask()) for _ in range(concurrency)]
    yield
    stopping = True
    await asyncio.gather(*asks)


async def all_wait(crew: Crew, model: str, count: int) -> bool:
    return await crew.cluster.waiting(model) == count


async def test_models_of_one_worker(crew: Crew, eventually: Eventually) -> None:
    """A worker with several models stays with the one that is loaded, since a swap is slow, and still comes to each of the others."""
    models = [f"{crew.model}-{letter}" for letter in "abc"]
    async with OpenAIDouble() as double:
        hold = asyncio.Event()
        double.behave(
            hold=hold,
            models=tuple({"id": name, "object": "model", "created": 7, "owned_by": "tests"} for name in models),
            first_delay_s=0.02,
        )
        await crew.start(backend="openai", WORKER_MODELS="", WORKER_BACKEND_URL=double.url, WORKER_CONCURRENCY="1")
        # It begins when all of them wait: a queue that a busy machine fills too slowly would be left for another one.
        first = crew.ask(model=models[0])
        await eventually(lambda: double.streaming)
        answers = [first, *(crew.ask(model=model) for _ in range(20) for model in models)]
        for model in models:
            await eventually(lambda model=model: all_wait(crew, model, 20))
        hold.set()
        for answer in answers:
            assert (await answer.end()).status == 200
        _, *order = [seen.json["model"] for seen in double.seen if seen.method == "POST"]
    assert Counter(order) == dict.fromkeys(models, 20)
    swaps = sum(before != after for before, after in pairwise(order))
    # In turn, there would be 60. Jobs this short end before the next one has moved out of the backlog.
    assert swaps <= 30, order
    assert max(order.index(model) for model in models) <= 30, order


def lane_of(answers: dict[str, list[Recorded]], ended: list[Recorded]) -> list[str]:
    lanes = {id(answer): lane for lane, group in answers.items() for answer in group}
    return [lanes[id(answer)] for answer in ended]


async def test_lanes(crew: Crew, eventually: Eventually) -> None:
    """Priority goes before a backlog of default requests, and flex still starts within eight higher jobs."""
    await crew.start(options="first_delay_ms=50,delay_ms=0,tokens=1", WORKER_CONCURRENCY="1")
    for tier in ("priority", "default", "flex"):
        await crew.ask(service_tier=tier).end()  # the worker knows the lane from its first job on
    holding = crew.ask(echo={"first_delay_ms": 60000})
    await eventually(lambda: crew.runs(1))
    ended: list[Recorded] = []
    answers: dict[str, list[Recorded]] = {}

    async def send(tier: str, count: int) -> None:
        answers[tier] = [crew.ask(service_tier=tier) for _ in range(count)]
        await eventually(lambda: crew.waits(sum(map(len, answers.values()))))

    await send("default", 20)
    await send("flex", 1)
    await send("priority", 4)
    await holding.hang_up()

    async def note(answer: Recorded) -> None:
        await answer.end()
        ended.append(answer)

    await asyncio.gather(*(note(answer) for group in answers.values() for answer in group))
    lanes = lane_of(answers, sorted(ended, key=lambda answer: answer.began + answer.seconds))
    assert {answer.status for answer in ended} == {200}
    # A queue that a gateway has named meanwhile gets one turn.
    assert lanes[:6].count("priority") >= 3, lanes
    assert lanes.index("flex") <= 9, lanes


class Team:
    """A caller with a team of its own."""

    def __init__(self, crew: Crew, name: str, key: str) -> None:
        self.name = name
        self._crew = crew
        self._headers = {"authorization": f"Bearer {key}"}

    @classmethod
    async def make(cls, crew: Crew, name: str, **fields: Any) -> Team:
        """Make the team and a key of it. `name`: unique in the cluster."""
        made = await crew.cluster.post("/v1/teams", {"id": name} | fields)
        assert made.status_code == 201, made.text
        key = await crew.cluster.post("/v1/keys", {"name": name, "owner": name})
        assert key.status_code == 201, key.text
        return cls(crew, name, key.json()["key"])

    async def submit(self, count: int, *, url: str = "") -> list[str]:
        """Submit jobs one after another; return their ids."""
        found = []
        for number in range(count):
            body = {"endpoint": "/v1/chat/completions", "body": chat(str(number), model=self._crew.model)}
            answer = await self._crew.cluster.http.post(
                (url or self._crew.cluster.url) + "/v1/jobs", json=body, headers=self._headers
            )
            assert answer.status_code == 202, answer.text
            found.append(answer.json()["id"])
        return found

    async def job(self, job: str) -> dict[str, Any]:
        """The job as its owner sees it, asked of the newest gateway."""
        answer = await self._crew.cluster.http.get(
            f"{self._crew.cluster.urls[-1]}/v1/jobs/{job}", headers=self._headers
        )
        return dict(answer.json())

    async def ask(self) -> str:
        """Answer a synchronous request; return its job's id."""
        answer = await self._crew.cluster.http.post(
            f"{self._crew.cluster.url}/v1/chat/completions",
            json=chat("now", model=self._crew.model),
            headers=self._headers,
        )
        assert answer.status_code == 200, answer.text
        return answer.headers["x-nexus-job-id"]


async def test_one_request_beside_two_hundred_jobs(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Two hundred jobs of one team wait for one slot; a single request of another team is the second or third to start, and each job
    of the first team knows its place.
    """
    worker = await crew.start(options="first_delay_ms=50,tokens=1", WORKER_CONCURRENCY="1")
    many, one = await Team.make(crew, f"many-{crew.model}"), await Team.make(crew, f"one-{crew.model}")
    holding = crew.ask(echo={"first_delay_ms": 60000})
    await eventually(lambda: crew.runs(1))
    jobs = await many.submit(200)
    assert [(await many.job(jobs[number]))["queue_position"] for number in (0, 1, 60, 199)] == [0, 1, 60, 199]
    asked = asyncio.create_task(one.ask())
    await eventually(lambda: crew.waits(201))
    assert (await many.job(jobs[60]))["queue_position"] == 61
    await holding.hang_up()
    job = await asked
    await eventually(lambda: len(cluster.attempts(worker)) >= 6)
    started = [attempt["job"] for attempt in cluster.attempts(worker) if attempt["job"] in {*jobs, job}]
    assert job in started[:3]
    assert [one for one in started if one != job] == jobs[: len(started) - 1]


async def test_a_gateway_and_a_worker_killed_while_teams_wait(
    crew: Crew, cluster: Cluster, eventually: Eventually
) -> None:
    """Jobs of three teams wait for one slot when a gateway and the worker are killed: each job completes, and none runs twice but the
    one that the worker had.
    """
    first = await crew.start(options="first_delay_ms=30,tokens=1", WORKER_CONCURRENCY="1")
    await cluster.start_gateway()
    teams = [
        await Team.make(crew, f"{name}-{crew.model}", weight=weight) for name, weight in (("a", 1), ("b", 2), ("c", 1))
    ]
    url = cluster.urls[-1]
    jobs = {team: await team.submit(15, url=url) for team in teams}
    await eventually(lambda: len(cluster.attempts(first)) >= 3)
    cluster.gateways[-1].kill()
    cluster.urls.pop()
    crew.kill(first)
    second = await crew.start(options="first_delay_ms=30,tokens=1", WORKER_CONCURRENCY="1")

    async def records() -> list[dict[str, Any]]:
        return [await team.job(job) for team in teams for job in jobs[team]]

    async def are_complete() -> bool:
        return all(record["status"] == "completed" for record in await records())

    await eventually(are_complete, timeout_s=60)
    attempts = [record["attempts"] for record in await records()]
    assert sum(attempts) <= 45 + 1, attempts
    # The killed worker may have lost the end of its log, never a job.
    ended = Counter(attempt["job"] for name in (first, second) for attempt in cluster.attempts(name))
    assert sum(ended.values()) <= len(ended) + 1, ended
