"""Jobs through a whole Nexus of two gateways: submitted, polled, watched, resumed, cancelled, tried again."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
import nats
import pytest
import pytest_asyncio

from tests.cluster import KEY, Cluster, Crew, chat, texts
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
SLOW = {"delay_ms": 100, "first_delay_ms": 0, "tokens": 50}
FOREVER = {"delay_ms": 200, "first_delay_ms": 0, "tokens": 10_000}


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def second(cluster: Cluster) -> str:
    """A second gateway's URL: what one has taken, the other knows."""
    await cluster.start_gateway()
    return cluster.urls[1]


@dataclass
class Event:
    """One server-sent event."""

    kind: str
    id: str
    data: Any


class Jobs:
    """The jobs of one test, for its crew's model."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.http = crew.cluster.http
        self.urls = crew.cluster.urls

    async def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        """`POST /v1/jobs`."""
        return await self.http.post(self.urls[0] + "/v1/jobs", json=body, headers=headers)

    def chat(self, content: str = "hello there", **fields: Any) -> dict[str, Any]:
        """The body of a chat request for the crew's model."""
        return chat(content, model=self.crew.model, **fields)

    async def submit(self, content: str = "hello there", *, job: dict[str, Any] | None = None, **fields: Any) -> str:
        """The id of a new chat job."""
        answer = await self.post({"endpoint": CHAT, "body": self.chat(content, **fields), **(job or {})})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    async def get(self, job: str, *, wait: float = 0, gateway: int = 1) -> dict[str, Any]:
        """The job object, from the other gateway."""
        answer = await self.http.get(f"{self.urls[gateway]}/v1/jobs/{job}", params={"wait": wait})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def end(self, job: str) -> dict[str, Any]:
        """The job object once it has ended."""
        found = await self.get(job, wait=30)
        assert found["status"] in {"completed", "failed", "cancelled", "expired"}, found
        return found

    async def result(self, job: str) -> httpx.Response:
        """Its result, from the other gateway."""
        return await self.http.get(f"{self.urls[1]}/v1/jobs/{job}/result")

    async def text(self, job: str) -> str:
        """What a chat that was not streamed answered."""
        return (await self.result(job)).json()["choices"][0]["message"]["content"]

    async def events(self, job: str, after: str = "", *, gateway: int = 1) -> AsyncIterator[Event]:
        """Its events as they come."""
        headers = {"last-event-id": after} if after else {}
        url = f"{self.urls[gateway]}/v1/jobs/{job}/events"
        async with self.http.stream("GET", url, headers=headers) as response:
            assert response.status_code == 200, (await response.aread()).decode()
            assert response.headers["content-type"].startswith("text/event-stream")
            fields: dict[str, str] = {}
            async for line in response.aiter_lines():
                if line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif not line and fields:
                    yield Event(fields["event"], fields.get("id", ""), json.loads(fields["data"]))
                    fields = {}

    async def all_events(self, job: str, after: str = "", *, gateway: int = 1) -> list[Event]:
        """All of them, to the end."""
        return [event async for event in self.events(job, after, gateway=gateway)]

    async def action(self, job: str, verb: str) -> httpx.Response:
        """`POST /v1/jobs/{id}/{verb}` at the other gateway."""
        return await self.http.post(f"{self.urls[1]}/v1/jobs/{job}/{verb}")


@pytest.fixture
def jobs(crew: Crew) -> Jobs:
    """For a model and workers of the test's own."""
    return Jobs(crew)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(cluster: Cluster, second: str) -> AsyncIterator[Jobs]:
    """For one worker that many tests use, and none stops."""
    crew = Crew(cluster, "shared")
    await crew.start(WORKER_CONCURRENCY="16")
    yield Jobs(crew)
    await crew.stop()


def chunk_texts(events: list[Event]) -> list[str]:
    return texts([json.dumps(event.data) for event in events if event.kind == "job.chunk"])


# Submit and poll


async def test_a_job_is_accepted_answered_and_kept(shared: Jobs) -> None:
    """202 with a place to look; the answer itself, byte for byte what a synchronous caller gets; on any gateway."""
    body = {"endpoint": CHAT, "body": shared.chat("one two"), "metadata": {"team": "blue"}}
    answer = await shared.post(body)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["x-nexus-job-id"] == job["id"]
    assert (job["object"], job["status"], job["model"]) == ("job", "queued", shared.crew.model)
    done = await shared.end(job["id"])
    assert done["status"] == "completed"
    assert done["metadata"] == {"team": "blue"}
    assert done["worker"] == shared.crew.names[0]
    assert (done["attempts"], done["usage"]["total_tokens"]) == (1, 4)
    assert done["started_at"] >= done["created_at"]
    result = await shared.result(job["id"])
    assert result.headers["content-type"] == "application/json"
    assert result.json()["choices"][0]["message"]["content"] == "one two"
    sync = (await shared.crew.cluster.post(CHAT, shared.chat("one two"))).json()
    assert sync["usage"] == result.json()["usage"]


async def test_a_model_without_a_worker_waits_for_one(jobs: Jobs, eventually: Eventually) -> None:
    """A job for a model of the catalog is accepted while no worker serves it, and runs when one comes; synchronous requests are 503."""
    name = await jobs.crew.start()
    assert (await jobs.crew.ask().end()).status == 200
    await jobs.crew.cluster.post(f"/v1/workers/{name}/drain", None)
    await eventually(lambda: _is_unlisted(jobs))
    assert (await jobs.crew.ask().end()).status == 503
    job = await jobs.submit("later")
    assert (await jobs.get(job))["status"] == "queued"
    await jobs.crew.start()
    assert (await jobs.end(job))["status"] == "completed"
    assert await jobs.text(job) == "later"


async def _is_unlisted(jobs: Jobs) -> bool:
    models = (await jobs.crew.cluster.get("/v1/models")).json()["data"]
    return jobs.crew.model not in {model["id"] for model in models}


@pytest.mark.parametrize(
    ("endpoint", "body", "content_type"),
    [
        ("/v1/completions", {"prompt": "a b c"}, "application/json"),
        ("/v1/embeddings", {"input": ["a", "b"]}, "application/json"),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}, "application/json"),
        ("/v1/images/generations", {"prompt": "a fox", "response_format": "b64_json"}, "application/json"),
        ("/v1/audio/speech", {"input": "hello", "voice": "alloy", "response_format": "wav"}, "audio/wav"),
    ],
)
async def test_every_modality(shared: Jobs, endpoint: str, body: dict[str, Any], content_type: str) -> None:
    """A job of any endpoint has the same record, and the endpoint's own result."""
    answer = await shared.post({"endpoint": endpoint, "body": {"model": shared.crew.model, **body}})
    assert answer.status_code == 202, answer.text
    assert (await shared.end(answer.json()["id"]))["status"] == "completed"
    result = await shared.result(answer.json()["id"])
    assert result.status_code == 200
    assert result.headers["content-type"].startswith(content_type)
    sync = await shared.crew.cluster.post(endpoint, {"model": shared.crew.model, **body})
    assert len(result.content) == len(sync.content)


async def test_a_picture_by_url(shared: Jobs) -> None:
    """The URL in a job's result can be fetched without a key, and is made when the result is asked for."""
    body = {"model": shared.crew.model, "prompt": "a fox", "response_format": "url"}
    answer = await shared.post({"endpoint": "/v1/images/generations", "body": body})
    await shared.end(answer.json()["id"])
    url = (await shared.result(answer.json()["id"])).json()["data"][0]["url"]
    async with httpx.AsyncClient() as stranger:
        picture = await stranger.get(url)
    assert picture.status_code == 200
    assert picture.headers["content-type"].startswith("image/")


async def test_a_form_is_a_job_by_prefer_and_by_file_ids(shared: Jobs) -> None:
    """A transcription: as the form itself with `Prefer`, or as JSON that names an uploaded file, which stays."""
    speech = {"model": shared.crew.model, "input": "some words", "voice": "alloy", "response_format": "wav"}
    wav = (await shared.crew.cluster.post("/v1/audio/speech", speech)).content
    form: dict[str, Any] = {"files": {"file": ("a.wav", wav)}, "data": {"model": shared.crew.model}}
    url = shared.urls[0] + "/v1/audio/transcriptions"
    answer = await shared.http.post(url, headers={"prefer": "respond-async"}, **form)
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    await shared.end(answer.json()["id"])
    by_form = (await shared.result(answer.json()["id"])).json()
    assert by_form == (await shared.http.post(url, **form)).json()

    files = shared.urls[0] + "/v1/files"
    file = (await shared.http.post(files, files={"file": ("a.wav", wav)}, data={"purpose": "user_data"})).json()
    for _ in range(2):
        body = {"model": shared.crew.model, "file": file["id"]}
        answer = await shared.post({"endpoint": "/v1/audio/transcriptions", "body": body})
        assert answer.status_code == 202, answer.text
        await shared.end(answer.json()["id"])
        assert (await shared.result(answer.json()["id"])).json() == by_form


async def test_prefer_with_a_wait(shared: Jobs) -> None:
    """`wait=N`: the answer itself if it is there in time, with its job's id; else the 202."""
    url = shared.urls[0] + CHAT
    quick = await shared.http.post(url, json=shared.chat("quick"), headers={"prefer": "respond-async, wait=20"})
    assert quick.status_code == 200
    assert quick.json()["choices"][0]["message"]["content"] == "quick"
    assert (await shared.end(quick.headers["x-nexus-job-id"]))["status"] == "completed"
    slow = await shared.http.post(url, json=shared.chat(echo=SLOW), headers={"prefer": "respond-async, wait=1"})
    assert slow.status_code == 202
    assert slow.headers["preference-applied"] == "respond-async, wait=1"
    refused = await shared.http.post(
        url, json=shared.chat(echo={"fail": "refuse"}), headers={"prefer": "respond-async, wait=20"}
    )
    assert refused.status_code == 400, "a job that failed in time is answered as the request would be"


async def test_a_result_asked_for_too_early(shared: Jobs) -> None:
    """404 `result_not_ready`, which SDKs do not retry by themselves; then the result; a failed job's is its error."""
    job = await shared.submit(echo=SLOW)
    early = await shared.result(job)
    assert (early.status_code, early.json()["error"]["code"]) == (404, "result_not_ready")
    await shared.action(job, "cancel")
    cancelled = await shared.result(job)
    assert (cancelled.status_code, cancelled.json()["error"]["code"]) == (400, "job_cancelled")
    failed = await shared.submit(echo={"fail": "error"})
    assert (await shared.end(failed))["error"]["message"]
    assert (await shared.result(failed)).status_code == 502


@pytest.mark.parametrize(
    "path",
    ["job_0", "job_" + "0" * 32, "job_*", "job_>", "job_" + "Z" * 32, "nothing", "job_" + "0" * 31 + "."],
)
@pytest.mark.parametrize("suffix", ["", "/result", "/events", "/cancel", "/retry"])
async def test_no_such_job(cluster: Cluster, path: str, suffix: str) -> None:
    """Whatever the id looks like: 404 `job_not_found`."""
    method = "POST" if suffix in {"/cancel", "/retry"} else "GET"
    answer = await cluster.http.request(method, f"{cluster.url}/v1/jobs/{path}{suffix}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"endpoint": 7}, "endpoint"),
        ({"body": {"model": "m"}}, "body.messages"),
        ({"body": "text"}, "body"),
        ({"unknown": 1}, "unknown"),
        ({"service_tier": "fast"}, "service_tier"),
        ({"timeout": 0}, "timeout"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"webhook": {"url": "ftp://example.com"}}, "webhook.url"),
        ({"webhook": {"url": "http://127.0.0.1:9/"}}, "webhook.url"),
        ({"endpoint": "/v1/audio/transcriptions", "body": {"model": "m"}}, "body.file"),
    ],
)
async def test_a_wrong_submit_says_what_is_wrong(
    cluster: Cluster, crew: Crew, change: dict[str, Any], param: str
) -> None:
    """400, naming the place."""
    good = {"endpoint": CHAT, "body": chat(model=crew.model)}
    answer = await cluster.post("/v1/jobs", good | change)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_an_unknown_model_is_refused_at_once(cluster: Cluster) -> None:
    """404, and no job."""
    answer = await cluster.post("/v1/jobs", {"endpoint": CHAT, "body": chat(model="no-such-model")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert answer.json()["error"]["param"] == "body.model"


async def test_a_long_poll_ends_with_the_job(shared: Jobs) -> None:
    """`?wait=` returns when the job ends, not before, and not when the time is up; with a short wait, as it stands."""
    job = await shared.submit(echo=SLOW | {"tokens": 10})
    assert (await shared.get(job, wait=0.1))["status"] in {"queued", "in_progress"}
    loop = asyncio.get_running_loop()
    began = loop.time()
    polls = await asyncio.gather(*(shared.get(job, wait=60, gateway=n % 2) for n in range(10)))
    assert {poll["status"] for poll in polls} == {"completed"}
    assert loop.time() - began < 40, "they were told, and did not sleep"
    wrong = await shared.http.get(f"{shared.urls[0]}/v1/jobs/{job}", params={"wait": "soon"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "wait")


async def test_lists_by_status_model_and_metadata_page_by_page(jobs: Jobs) -> None:
    """Newest first; filters combine; pages do not overlap, and end."""
    await jobs.crew.start()
    ids = [await jobs.submit(f"job {n}", job={"metadata": {"kind": "ab"[n % 2], "n": str(n)}}) for n in range(7)]
    bad = await jobs.submit(echo={"fail": "error"})
    for job in [*ids, bad]:
        await jobs.end(job)

    async def listed(**query: Any) -> dict[str, Any]:
        query = {"model": jobs.crew.model} | query
        answer = await jobs.http.get(jobs.urls[1] + "/v1/jobs", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    every = await listed(limit=100)
    assert [job["id"] for job in every["data"]] == [bad, *reversed(ids)]
    assert not every["has_more"]
    assert [job["id"] for job in (await listed(status="failed"))["data"]] == [bad]
    ours = await listed(**{"metadata[kind]": "a", "status": "completed"})
    assert [job["metadata"]["n"] for job in ours["data"]] == ["6", "4", "2", "0"]
    seen: list[str] = []
    page = await listed(limit=3)
    while True:
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        page = await listed(limit=3, after=page["last_id"])
    assert seen == [bad, *reversed(ids)]
    assert (await listed(model="another"))["data"] == []
    # A filter that cannot be understood is refused: without it, others' jobs would be listed as those asked for.
    wrong = ({"metadata[]": "a"}, {f"metadata[{'k' * 65}]": "a"}, {"metadata[kind": "a"}, {"metadata": "a"})
    for query in ({"limit": 0}, {"limit": 101}, {"status": "sleeping"}, *wrong):
        answer = await jobs.http.get(jobs.urls[1] + "/v1/jobs", params=query)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(query))


async def test_the_position_is_true_within_a_lane(jobs: Jobs, eventually: Eventually) -> None:
    """Jobs before it that wait: synchronous ones count, running ones do not, another lane's do not; one that leaves makes room."""
    await jobs.crew.start(WORKER_CONCURRENCY="1")
    running = await jobs.submit(echo=FOREVER)
    await eventually(lambda: jobs.crew.runs(1))
    first = await jobs.submit()
    sync = jobs.crew.ask("a synchronous one")
    await eventually(lambda: jobs.crew.waits(2))
    second, flex = await jobs.submit(), await jobs.submit(job={"service_tier": "flex"})
    third = await jobs.submit()

    async def places() -> list[int | None]:
        found = [await jobs.get(job, gateway=n % 2) for n, job in enumerate((running, first, second, third, flex))]
        return [job["queue_position"] for job in found]

    assert await places() == [None, 0, 2, 3, 0]
    assert (await jobs.action(first, "cancel")).json()["status"] == "cancelled"
    assert await eventually(places) == [None, None, 1, 2, 0]
    await jobs.action(running, "cancel")
    assert (await sync.end()).status == 200
    for job in (second, third, flex):
        assert (await jobs.end(job))["status"] == "completed"


async def test_an_estimate_comes_from_what_jobs_took(jobs: Jobs, eventually: Eventually) -> None:
    """`eta_seconds` is null before anything was measured, and a number afterwards."""
    await jobs.crew.start(WORKER_CONCURRENCY="1")
    blocking = await jobs.submit(echo=FOREVER)
    await eventually(lambda: jobs.crew.runs(1))
    waiting = await jobs.submit(echo=SLOW | {"tokens": 5})
    assert (await jobs.get(waiting))["eta_seconds"] is None
    await jobs.action(blocking, "cancel")
    await jobs.end(waiting)
    blocking = await jobs.submit(echo=FOREVER)
    await eventually(lambda: jobs.crew.runs(1))
    waiting = await jobs.submit()

    async def eta() -> Any:
        return (await jobs.get(waiting))["eta_seconds"]

    assert await eventually(eta) > 0
    assert (await jobs.get(blocking))["eta_seconds"] is not None
    await jobs.action(blocking, "cancel")


# Watch and resume


async def test_events_from_the_beginning_to_the_end(shared: Jobs) -> None:
    """Each event once, in order, with ids that grow; the chunks are the endpoint's own, and together the answer."""
    job = await shared.submit("a b c d e", stream=True)
    events = await shared.all_events(job)
    kinds = [event.kind for event in events if event.kind != "job.queued"]
    assert kinds[0] == "job.started"
    assert kinds[-1] == "job.completed"
    assert set(kinds[1:-1]) == {"job.chunk"}
    ids = [tuple(map(int, event.id.split("-"))) for event in events]
    assert ids == sorted(set(ids))
    assert "".join(chunk_texts(events)) == "a b c d e"
    assert events[-1].data["status"] == "completed"
    assert events[-1].data["usage"]["total_tokens"] == 10
    again = await shared.all_events(job, gateway=0)
    assert again == events, "from any gateway, also afterwards, the same"
    result = await shared.result(job)
    assert result.headers["content-type"].startswith("text/event-stream")
    assert result.text.endswith("data: [DONE]\n\n")


async def test_a_watcher_resumes_anywhere(shared: Jobs) -> None:
    """Broken off after any event, and resumed on another gateway while the job runs: nothing missing, nothing twice."""
    words = " ".join(str(n) for n in range(30))
    job = await shared.submit(words, stream=True, echo={"delay_ms": 20})
    seen: list[Event] = []
    gateway = 0
    while not seen or seen[-1].kind != "job.completed":
        took = 0
        async for event in shared.events(job, seen[-1].id if seen else "", gateway=gateway % 2):
            seen.append(event)
            took += 1
            if took == 5:
                break
        gateway += 1
    assert gateway > 5
    assert len({event.id for event in seen}) == len(seen)
    assert "".join(chunk_texts(seen)) == words
    url = f"{shared.urls[0]}/v1/jobs/{job}/events"
    nothing = await shared.http.get(url, headers={"last-event-id": seen[-1].id})
    assert nothing.status_code == 204, "all of it had been seen"


async def test_sound_is_watched_as_it_is_made(shared: Jobs) -> None:
    """Chunks of what is no stream of events come in base64."""
    body = {"model": shared.crew.model, "input": "some words to say", "voice": "alloy", "response_format": "pcm"}
    answer = await shared.post({"endpoint": "/v1/audio/speech", "body": body})
    events = await shared.all_events(answer.json()["id"])
    sound = b"".join(base64.b64decode(event.data["b64"]) for event in events if event.kind == "job.chunk")
    assert sound
    assert sound == (await shared.result(answer.json()["id"])).content


async def test_a_bad_event_id(shared: Jobs) -> None:
    """400, not a stream."""
    job = await shared.submit()
    for after in ("7", "a-b-c", "1-1-1-1", "'"):
        answer = await shared.http.get(f"{shared.urls[0]}/v1/jobs/{job}/events", headers={"last-event-id": after})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


async def test_events_past_their_retention(shared: Jobs, cluster: Cluster) -> None:
    """What is not kept any more is an error, never a gap; who has had it goes on; the result is still there."""
    whole: list[Event] = []
    while not whole or whole[0].kind != "job.queued":  # a quick worker's start may be stored before it
        job = await shared.submit("a b c d e", stream=True)
        whole = await shared.all_events(job)
    client = await nats.connect(cluster.nats.url)
    try:
        stream = client.jetstream()
        # All but the last four go, the start among them.
        await stream.purge_stream("NEXUS_EVENTS", subject=f"nexus.events.{job}", keep=3)
        answer = await shared.http.get(f"{shared.urls[0]}/v1/jobs/{job}/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "events_expired")
        assert await shared.all_events(job, whole[-5].id) == whole[-4:]
        await stream.purge_stream("NEXUS_EVENTS", subject=f"nexus.events.{job}")
    finally:
        await client.close()
    answer = await shared.http.get(f"{shared.urls[0]}/v1/jobs/{job}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "events_expired")
    assert (await shared.result(job)).status_code == 200


async def test_a_synchronous_stream_that_can_be_resumed(shared: Jobs) -> None:
    """`x-nexus-resume: true`: the job's id comes first, each frame has an id, and anyone who hangs up goes on elsewhere."""
    words = " ".join(str(n) for n in range(20))
    headers = {"x-nexus-resume": "true"}
    body = shared.chat(words, stream=True, echo={"delay_ms": 30})
    had: list[str] = []
    last = ""
    async with shared.http.stream("POST", shared.urls[0] + CHAT, json=body, headers=headers) as response:
        assert response.status_code == 200
        job = response.headers["x-nexus-job-id"]
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                last = line[4:]
            if line.startswith("data: "):
                had.append(line[6:])
                if len(had) == 5:
                    break
    rest = [event async for event in shared.events(job, last)]
    assert rest[-1].kind == "job.completed", "it went on without its caller"
    assert "".join(texts(had) + chunk_texts(rest)) == words
    whole = await shared.http.post(shared.urls[0] + CHAT, json=shared.chat("a b", stream=True), headers=headers)
    assert whole.text.endswith("data: [DONE]\n\n")


# Cancel, expire, lanes, limits


async def test_a_queued_job_that_is_cancelled_never_runs(jobs: Jobs, eventually: Eventually) -> None:
    """No matter who cancels, and how often: one cancelled record, and no attempt."""
    name = await jobs.crew.start(WORKER_CONCURRENCY="1")
    blocking = await jobs.submit(echo=FOREVER)
    await eventually(lambda: jobs.crew.runs(1))
    job = await jobs.submit()
    answers = await asyncio.gather(*(jobs.action(job, "cancel") for _ in range(5)))
    assert {answer.json()["status"] for answer in answers} == {"cancelled"}
    await jobs.action(blocking, "cancel")
    after = await jobs.submit()
    assert (await jobs.end(after))["status"] == "completed"
    assert (await jobs.end(job))["status"] == "cancelled"
    await eventually(jobs.crew.idle)
    assert job not in {attempt["job"] for attempt in jobs.crew.cluster.attempts(name)}
    assert [event.kind for event in await jobs.all_events(job)] == ["job.queued", "job.cancelled"]


async def test_a_running_job_that_is_cancelled_stops(shared: Jobs, eventually: Eventually) -> None:
    """The backend is told; the stream of events ends; cancelling what has ended changes nothing."""
    name = shared.crew.names[0]
    job = await shared.submit(stream=True, echo=FOREVER)
    watched: list[Event] = []
    async for event in shared.events(job):
        watched.append(event)
        if len(watched) == 4:
            assert (await shared.action(job, "cancel")).json()["status"] == "cancelled"
    assert watched[-1].kind == "job.cancelled"
    await eventually(lambda: [one for one in shared.crew.cluster.attempts(name) if one["job"] == job])
    assert [one["outcome"] for one in shared.crew.cluster.attempts(name) if one["job"] == job] == ["cancelled"]
    done = await shared.submit()
    assert (await shared.end(done))["status"] == "completed"
    assert (await shared.action(done, "cancel")).json()["status"] == "completed"


async def test_cancel_and_completion_race_to_one_end(shared: Jobs) -> None:
    """Whichever is first: record, events and result agree."""
    ids = [await shared.submit("one two three", stream=True) for _ in range(30)]
    await asyncio.gather(*(shared.action(job, "cancel") for job in ids))
    ended = set()
    for job in ids:
        status = (await shared.end(job))["status"]
        ended.add(status)
        events = await shared.all_events(job)
        assert events[-1].kind == f"job.{status}"
        assert sum(event.kind in {"job.completed", "job.cancelled", "job.failed"} for event in events) == 1
        assert (await shared.result(job)).status_code == (200 if status == "completed" else 400)
    assert ended <= {"completed", "cancelled"}


async def test_a_timeout_ends_a_job_whatever_it_does(jobs: Jobs, eventually: Eventually) -> None:
    """Waiting or running: `expired`, with the reason; the backend is stopped."""
    name = await jobs.crew.start(WORKER_CONCURRENCY="1")

    async def expires(job: str) -> None:
        ended = await jobs.end(job)
        assert ended["status"] == "expired"
        assert "timeout" in ended["error"]["message"]
        assert (await jobs.result(job)).status_code == 504

    blocking = await jobs.submit(echo=FOREVER)
    await eventually(lambda: jobs.crew.runs(1))
    waiting = await jobs.submit(job={"timeout": 1})
    await expires(waiting)
    await jobs.action(blocking, "cancel")
    running = await jobs.submit(echo=FOREVER, job={"timeout": 2})
    await expires(running)
    after = await jobs.submit()
    assert (await jobs.end(after))["status"] == "completed"
    await eventually(jobs.crew.idle)
    assert waiting not in {attempt["job"] for attempt in jobs.crew.cluster.attempts(name)}


async def test_priority_goes_first_and_flex_last(jobs: Jobs, eventually: Eventually) -> None:
    """`service_tier`, of the job or of its body, chooses the lane."""
    name = await jobs.crew.start(WORKER_CONCURRENCY="1")
    blocking = await jobs.submit(echo=FOREVER)
    await eventually(lambda: jobs.crew.runs(1))
    flex = await jobs.submit(job={"service_tier": "flex"})
    default = await jobs.submit()
    priority = await jobs.submit(service_tier="priority")
    assert [(await jobs.get(job))["service_tier"] for job in (flex, default, priority)] == [
        "flex",
        "default",
        "priority",
    ]
    await eventually(lambda: jobs.crew.waits(3))
    await jobs.action(blocking, "cancel")
    for job in (flex, default, priority):
        await jobs.end(job)

    def order() -> list[str]:
        return [one["job"] for one in jobs.crew.cluster.attempts(name) if one["outcome"] == "completed"]

    await eventually(lambda: len(order()) == 3)
    assert order() == [priority, default, flex]


async def test_a_key_has_its_limits(jobs: Jobs, cluster: Cluster, eventually: Eventually) -> None:
    """Jobs over `max_queued` are 429; over `max_running` they wait although slots are free; another key is not held up."""
    name = await jobs.crew.start(WORKER_CONCURRENCY="4")
    made = await cluster.post("/v1/keys", {"name": jobs.crew.model, "max_queued": 3, "max_running": 1})
    headers = {"authorization": f"Bearer {made.json()['key']}"}
    body = {"endpoint": CHAT, "body": jobs.chat(echo=SLOW | {"tokens": 4})}
    running = (await jobs.post(body, **headers)).json()["id"]

    async def status(job: str) -> str:
        answer = await jobs.http.get(f"{jobs.urls[0]}/v1/jobs/{job}", headers=headers)
        return answer.json()["status"]

    async def runs() -> bool:
        return await status(running) == "in_progress"

    await eventually(runs)
    accepted = [(await jobs.post(body, **headers)).json()["id"] for _ in range(3)]
    refused = await jobs.post(body, **headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) > 0
    mine = await jobs.submit()
    assert (await jobs.end(mine))["status"] == "completed", "the tenant's jobs do not hold up others"
    for job in (running, *accepted):
        answer = await jobs.http.get(f"{jobs.urls[1]}/v1/jobs/{job}", params={"wait": 30}, headers=headers)
        assert answer.json()["status"] == "completed"

    def spans() -> list[tuple[str, float]]:
        ended = [one for one in cluster.attempts(name) if one["outcome"] == "completed"]
        return sorted((one["timestamp"], one["seconds"]) for one in ended if one["job"] in {running, *accepted})

    await eventually(lambda: len(spans()) == 4)
    ends = [datetime.fromisoformat(at).timestamp() for at, _ in spans()]
    begins = [end - seconds for end, (_, seconds) in zip(ends, spans(), strict=True)]
    assert all(begin > end - 0.05 for begin, end in zip(begins[1:], ends, strict=False)), "one at a time"


async def test_another_owners_job_does_not_exist(shared: Jobs, cluster: Cluster) -> None:
    """Record, result, events, cancel, retry: 404; and it is in no list."""
    job = await shared.submit()
    await shared.end(job)
    made = await cluster.post("/v1/keys", {"name": "stranger-of-" + shared.crew.model})
    headers = {"authorization": f"Bearer {made.json()['key']}"}
    for path in ("", "/result", "/events"):
        answer = await shared.http.get(f"{shared.urls[0]}/v1/jobs/{job}{path}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    for verb in ("cancel", "retry"):
        answer = await shared.http.post(f"{shared.urls[0]}/v1/jobs/{job}/{verb}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    assert (await shared.http.get(shared.urls[0] + "/v1/jobs", headers=headers)).json()["data"] == []


# Idempotency


async def test_one_key_one_run_in_a_race_of_fifty(shared: Jobs, eventually: Eventually) -> None:
    """Fifty at once over two gateways, by all ways in: one run, one answer; another body is 422."""
    name = shared.crew.names[0]
    key: dict[str, Any] = {"idempotency-key": "race-" + shared.crew.model}
    body = shared.chat("only once", echo={"delay_ms": 50})

    async def ask(n: int) -> httpx.Response:
        headers = key | ({"prefer": "respond-async, wait=30"} if n % 3 == 0 else {})
        return await shared.http.post(shared.urls[n % 2] + CHAT, json=body, headers=headers)

    answers = await asyncio.gather(*(ask(n) for n in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["x-nexus-job-id"] for answer in answers}) == 1
    other = await shared.http.post(shared.urls[0] + CHAT, json=shared.chat("another"), headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    late = await ask(1)
    assert late.content == answers[0].content
    job = answers[0].headers["x-nexus-job-id"]
    runs = await eventually(lambda: [one for one in shared.crew.cluster.attempts(name) if one["job"] == job])
    assert len(runs) == 1


async def test_the_same_key_joins_a_stream(shared: Jobs, eventually: Eventually) -> None:
    """While it runs, the second caller gets the stream from its beginning; afterwards too; the first one's hanging up stops nothing."""
    words = " ".join(str(n) for n in range(15))
    key: dict[str, Any] = {"idempotency-key": "stream-" + shared.crew.model}
    body: dict[str, Any] = {"stream": True, "echo": {"delay_ms": 50}, "model": shared.crew.model}
    first = shared.crew.cluster.record(chat(words, **body), **key)
    await eventually(lambda: first.texts)
    second = shared.crew.cluster.record(chat(words, **body), url=shared.urls[1], **key)
    await eventually(lambda: second.texts)
    await first.hang_up()
    assert (await second.end()).complete
    assert "".join(second.texts) == words
    third = await shared.crew.cluster.record(chat(words, **body), **key).end()
    assert third.lines == second.lines


async def test_the_same_key_gets_its_stream_when_events_are_gone(shared: Jobs, cluster: Cluster) -> None:
    """An answer is kept longer than the events that it came in: anyone who comes again gets all of it."""
    key: dict[str, Any] = {"idempotency-key": "events-gone-" + shared.crew.model}
    body = shared.chat("one two three", stream=True)
    first = await shared.http.post(shared.urls[0] + CHAT, json=body, headers=key)
    client = await nats.connect(cluster.nats.url)
    try:
        subject = f"nexus.events.{first.headers['x-nexus-job-id']}"
        await client.jetstream().purge_stream("NEXUS_EVENTS", subject=subject)
    finally:
        await client.close()
    again = await shared.http.post(shared.urls[1] + CHAT, json=body, headers=key)
    assert (again.status_code, again.text) == (200, first.text)
    assert again.headers["content-type"] == first.headers["content-type"]


@pytest.mark.parametrize("stream", [True, False])
async def test_whoever_comes_when_the_result_is_gone_is_told(shared: Jobs, cluster: Cluster, stream: bool) -> None:
    """Also where events are there still: nobody waits for an end that has been."""
    key: dict[str, Any] = {"idempotency-key": f"result-gone-{stream}-" + shared.crew.model}
    body = shared.chat("one two three", stream=stream)
    job = (await shared.http.post(shared.urls[0] + CHAT, json=body, headers=key)).headers["x-nexus-job-id"]
    await shared.end(job)
    client = await nats.connect(cluster.nats.url)
    try:
        await client.jetstream().purge_stream("NEXUS_DONE", subject=f"nexus.done.{job}")
    finally:
        await client.close()
    for wish in ({}, {"prefer": "respond-async, wait=20"}):
        again = await shared.http.post(shared.urls[1] + CHAT, json=body, headers=key | wish)
        if stream and not wish:  # what is there of it comes, and no end that says that this is all
            assert "events_expired" in again.text
            assert "[DONE]" not in again.text
        else:
            assert (again.status_code, again.json()["error"]["code"]) == (404, "result_expired")
    events = await shared.http.get(f"{shared.urls[1]}/v1/jobs/{job}/events")
    assert "events_expired" in events.text


async def test_a_submitted_job_has_its_key_too(shared: Jobs) -> None:
    """`POST /v1/jobs` with a key: the same job again; other metadata is another request; owners do not share keys."""
    body = {"endpoint": CHAT, "body": shared.chat(), "metadata": {"a": "1"}}
    key: dict[str, Any] = {"idempotency-key": "submit-" + shared.crew.model}
    first, second = await shared.post(body, **key), await shared.post(body, **key)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    other = await shared.post(body | {"metadata": {"a": "2"}}, **key)
    assert other.status_code == 422
    made = await shared.crew.cluster.post("/v1/keys", {"name": "twin-of-" + shared.crew.model})
    headers = {"authorization": f"Bearer {made.json()['key']}"}
    theirs = await shared.post(body, **key, **headers)
    assert theirs.status_code == 202
    assert theirs.json()["id"] != first.json()["id"]


# Failures, again


async def test_a_failed_job_is_tried_again(shared: Jobs, eventually: Eventually) -> None:
    """Permanent: failed at once, not among the dead letters; `retry` is a new run of the same job; only of a failed one."""
    name = shared.crew.names[0]
    job = await shared.submit(echo={"fail": "error", "fail_times": 1})
    failed = await shared.end(job)
    assert (failed["status"], failed["attempts"], failed["run"]) == ("failed", 1, 1)
    assert (await shared.crew.cluster.get(f"/v1/dlq/{job}")).status_code == 404
    again = await asyncio.gather(*(shared.action(job, "retry") for _ in range(4)))
    # One of them begins the new run; another that finds it half begun makes it whole, and is told the same.
    assert {answer.status_code for answer in again} <= {202, 400}
    runs = {answer.json()["run"] for answer in again if answer.status_code == 202}
    assert runs == {2}
    done = await shared.end(job)
    assert (done["status"], done["run"], done["error"]) == ("completed", 2, None)
    assert await shared.text(job) == "hello there"
    assert (await shared.action(job, "retry")).json()["error"]["code"] == "job_not_failed"
    await eventually(lambda: len([one for one in shared.crew.cluster.attempts(name) if one["job"] == job]) == 2)
    kinds = [event.kind for event in await shared.all_events(job)]
    assert kinds[-2:] == ["job.restarted", "job.completed"]


async def test_retries_used_up_are_a_dead_letter(shared: Jobs) -> None:
    """Transient failures are tried three times; then the job is failed, among the dead letters, and can be replayed from there."""
    job = await shared.submit("third time lucky", echo={"fail": "before", "fail_times": 3})
    failed = await shared.end(job)
    assert (failed["status"], failed["attempts"]) == ("failed", 3)
    listed = (await shared.crew.cluster.get("/v1/dlq")).json()
    (letter,) = [one for one in listed["data"] if one["id"] == job]
    assert letter["error"] == failed["error"]
    assert letter["model"] == shared.crew.model
    shown = (await shared.crew.cluster.get(f"/v1/dlq/{job}")).json()
    assert shown["request"]["messages"][0]["content"] == "third time lucky"
    replayed = await shared.crew.cluster.post(f"/v1/dlq/{job}/replay", None)
    assert replayed.status_code == 202
    assert (await shared.end(job))["status"] == "completed"
    assert await shared.text(job) == "third time lucky"
    assert (await shared.crew.cluster.get(f"/v1/dlq/{job}")).status_code == 404
    assert (await shared.crew.cluster.post(f"/v1/dlq/{job}/replay", None)).status_code == 404


async def test_a_dead_letter_is_deleted(shared: Jobs) -> None:
    """It is gone; the job stays failed."""
    job = await shared.submit(echo={"fail": "before"})
    await shared.end(job)
    gone = await shared.http.delete(f"{shared.urls[0]}/v1/dlq/{job}")
    assert gone.json() == {"id": job, "object": "dead_letter", "deleted": True}
    assert (await shared.http.delete(f"{shared.urls[0]}/v1/dlq/{job}")).status_code == 404
    assert (await shared.get(job))["status"] == "failed"


async def test_a_transient_failure_in_the_middle_begins_anew(shared: Jobs) -> None:
    """What came of the first attempt is void, and said to be; the result is whole."""
    job = await shared.submit("a b c d", stream=True, echo={"fail": "mid", "fail_times": 1})
    events = await shared.all_events(job)
    kinds = [event.kind for event in events]
    assert kinds.count("job.restarted") == 1
    rest = events[kinds.index("job.restarted") :]
    assert "".join(chunk_texts(rest)) == "a b c d"
    assert kinds[-1] == "job.completed"
    assert "".join(
        texts([line[6:] for line in (await shared.result(job)).text.split("\n") if line[:6] == "data: "])
    ) == ("a b c d")


async def test_a_drained_worker_hands_its_job_over(jobs: Jobs, cluster: Cluster, eventually: Eventually) -> None:
    """It is no failed attempt; the next worker begins again."""
    name = await jobs.crew.start(WORKER_DRAIN_S="0.2")
    job = await jobs.submit("a b c", stream=True, echo={"delay_ms": 300, "first_delay_ms": 0, "tokens": 20})

    async def runs() -> bool:
        return (await jobs.get(job))["worker"] == name

    await eventually(runs)
    await cluster.post(f"/v1/workers/{name}/drain", None)
    await cluster.workers[name].wait()
    other = await jobs.crew.start()
    done = await jobs.end(job)
    assert (done["status"], done["attempts"], done["worker"]) == ("completed", 1, other)


async def test_large_answers_and_uploads(shared: Jobs) -> None:
    """Megabytes in and out: by reference, whole, streamed to their caller."""
    size = 3_000_000
    job = await shared.submit("x", echo={"size": size})
    assert (await shared.end(job))["status"] == "completed"
    assert len(await shared.text(job)) >= size
    long = "word " * 200_000
    job = await shared.submit(long)
    assert (await shared.end(job))["status"] == "completed"
    assert (await shared.text(job)).split() == long.split()


async def test_a_large_answer_that_was_lost(shared: Jobs, cluster: Cluster) -> None:
    """It is an error, and no answer that breaks off."""
    job = await shared.submit("x", echo={"size": 3_000_000})
    assert (await shared.end(job))["status"] == "completed"
    client = await nats.connect(cluster.nats.url)
    try:
        await client.jetstream().purge_stream("OBJ_nexus-blobs")
    finally:
        await client.close()
    answer = await shared.result(job)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "content_gone")


async def test_no_defect_was_logged(cluster: Cluster) -> None:
    """Last: nothing above made a gateway or a worker stumble."""
    for process in [*cluster.gateways, *cluster.workers.values()]:
        lines = process.log_file.read_text().splitlines() if process.log_file else []
        assert not [line[:2000] for line in lines if "Traceback" in line or '"level":"error"' in line]
    assert KEY not in "".join(process.log_file.read_text() for process in cluster.gateways if process.log_file)
