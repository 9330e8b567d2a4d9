"""Batches from their making to their files, on memory; jobs end as the tests say."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from backbone.bus.blobs import INLINE_LIMIT_BYTES
from gateway.auth.authenticator import Principal
from gateway.batches import executor, line_jobs, scheduler
from gateway.batches.input_file import job_id, validate
from gateway.batches.repository import BatchNotFound
from gateway.batches.service import PICKUP_GRACE_S, max_window_s
from gateway.files import FileNotFound, StorageFull
from gateway.limits.effective import EffectiveLimits
from schemas.batches import Batch, BatchRequest, BatchStatus, RequestCounts
from schemas.errors import (
    BackendFailed,
    InvalidRequest,
    ModelNotFound,
    NexusError,
    PermissionDenied,
    QueueFull,
    RateLimited,
    Unavailable,
)
from schemas.jobs import JobRecord, JobStatus, Lane
from schemas.keys import Scope
from tests.conftest import Eventually
from tests.unit.gateway.batches.batch_desk import CHAT, OWNER, Answered, Desk, echoed, line


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    for module, name in (
        (executor, "REFRESH_INTERVAL_S"),
        (executor, "RETRY_DELAY_S"),
        (line_jobs, "RETRY_DELAY_S"),
        (scheduler, "RETRY_DELAY_S"),
    ):
        monkeypatch.setattr(module, name, 0.02)
    desk = Desk()
    yield desk
    await desk.close()


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["custom_id"] for row in rows]


class TestMaking:
    async def test_the_batch_object_is_openais(self, desk: Desk) -> None:
        """What a caller gets at once."""
        batch = await desk.create(line("a"), metadata={"project": "x"})
        shown = batch.to_openai()
        assert shown == {
            "id": batch.id,
            "object": "batch",
            "endpoint": CHAT,
            "model": None,
            "errors": None,
            "input_file_id": batch.input_file_id,
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": batch.created_at,
            "in_progress_at": None,
            "expires_at": batch.created_at + 86_400,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "usage": None,
            "metadata": {"project": "x"},
        }
        assert await desk.batch(batch) == batch

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"endpoint": "/v1/nonsense"}, "endpoint"),
            ({"endpoint": "/v1/models/pull"}, "endpoint"),
            ({"completion_window": "1w"}, "completion_window"),
            ({"completion_window": "2d"}, "completion_window"),
            ({"completion_window": "0m"}, "completion_window"),
        ],
    )
    async def test_what_is_wrong_is_named(self, desk: Desk, changes: dict[str, str], param: str) -> None:
        """Before anything is stored."""
        file = await desk.file(line("a"))
        fields = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changes
        with pytest.raises(InvalidRequest) as raised:
            await desk.batches.create(Principal(OWNER), BatchRequest(**fields), "")
        assert raised.value.info.param == param
        assert await desk.batches.page(OWNER, after="", limit=10) == ([], False)

    async def test_its_input_is_a_file_of_its_owner_for_batches(self, desk: Desk) -> None:
        """Another owner's file does not exist, and a picture is no input."""
        picture = await desk.file(b"x", purpose="vision")
        request = BatchRequest(input_file_id=picture.id, endpoint=CHAT, completion_window="24h")
        with pytest.raises(InvalidRequest, match="purpose"):
            await desk.batches.create(Principal(OWNER), request, "")
        with pytest.raises(FileNotFound):
            await desk.batches.create(Principal("bob"), request, "")

    async def test_a_key_that_may_not_infer_makes_no_batches(self, desk: Desk) -> None:
        """A batch is inference by another way."""
        file = await desk.file(line("a"))
        request = BatchRequest(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        with pytest.raises(PermissionDenied):
            await desk.batches.create(Principal(OWNER, scopes=frozenset({Scope.JOBS})), request, "")

    async def test_what_could_not_be_queued_never_runs(self, desk: Desk) -> None:
        """The caller gets an error, and the batch does not run even if NATS stored it."""
        put = desk.backlog.put

        async def stored_but_unconfirmed(item_id: str, data: bytes) -> None:
            await put(item_id, data)
            raise Unavailable

        desk.backlog.put = stored_but_unconfirmed  # type: ignore[method-assign]
        with pytest.raises(Unavailable):
            await desk.create(line("a"))
        await desk.gateway()
        [batch], _ = await desk.batches.page(OWNER, after="", limit=10)
        assert batch.status is BatchStatus.FAILED
        await asyncio.sleep(0)
        assert desk.jobs.runs == {}

    async def test_pages_end(self, desk: Desk) -> None:
        """Newest first, each once."""
        made = sorted([(await desk.create(line("a"))).id for _ in range(5)], reverse=True)
        first, more = await desk.batches.page(OWNER, after="", limit=3)
        rest, end = await desk.batches.page(OWNER, after=first[-1].id, limit=3)
        assert ([one.id for one in first + rest], more, end) == (made, True, False)

    async def test_another_owners_batch_does_not_exist(self, desk: Desk) -> None:
        """It is neither shown nor cancelled."""
        batch = await desk.create(line("a"))
        for call in (desk.batches.get, desk.batches.cancel):
            with pytest.raises(BatchNotFound):
                await call("bob", batch.id)
        assert await desk.batches.page("bob", after="", limit=10) == ([], False)

    def test_results_outlast_the_longest_window(self) -> None:
        """The first line's result is there when the last one ends."""
        assert max_window_s(604_800) == 601_200
        assert max_window_s(60) == 54


class TestRunning:
    async def test_answers_in_the_order_of_the_input(self, desk: Desk) -> None:
        """However they came; with counts, usage and all times."""
        await desk.gateway()
        made = await desk.create(*[line(f"r{number}") for number in range(30)])
        batch = await desk.ended(made)
        assert batch.status is BatchStatus.COMPLETED
        assert batch.counts == RequestCounts(total=30, completed=30, failed=0)
        assert (batch.model, batch.error_file_id, batch.errors) == ("m", None, ())
        assert batch.in_progress_at is not None
        assert batch.finalizing_at is not None
        assert batch.completed_at is not None
        assert batch.tokens is not None
        assert batch.tokens.to_openai() == {
            "input_tokens": 90,
            "input_tokens_details": {"cached_tokens": 30},
            "output_tokens": 60,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 150,
        }
        rows = await desk.rows(batch.output_file_id)
        assert ids(rows) == [f"r{number}" for number in range(30)]
        job = job_id(batch.id, 1)
        assert rows[0] == {
            "id": "batch_req_" + job.removeprefix("job_"),
            "custom_id": "r0",
            "response": {
                "status_code": 200,
                "request_id": rows[0]["response"]["request_id"],
                "body": {"echo": "r0"},
            },
            "error": None,
        }
        assert set(desk.jobs.runs.values()) == {1}
        output = await desk.files.open(OWNER, batch.output_file_id or "")
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")

    async def test_lines_are_jobs_in_the_lane_flex(self, desk: Desk) -> None:
        """Of their batch, against its key, until its window ends."""
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a")))
        [submission] = desk.jobs.submitted
        assert (submission.lane, submission.batch, submission.webhook) == (Lane.FLEX, batch.id, "")
        assert submission.metadata == {"custom_id": "a"}
        assert 86_400 <= (submission.timeout_s or 0) <= 86_400 + 2 * line_jobs.EXPIRY_MARGIN_S

    async def test_no_more_jobs_at_once_than_the_window(self, desk: Desk, eventually: Eventually) -> None:
        """The next line waits for one that has ended."""
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        batch = await desk.create(*[line(f"r{number}") for number in range(20)])
        done: set[str] = set()
        for _ in range(20):
            await eventually(lambda: len(desk.jobs.open) == min(8, 20 - len(done)))
            job, submission = next(iter(desk.jobs.open.items()))
            await desk.jobs.finish(job, Answered(b"{}"))
            done.add(submission.job_id)
        assert (await desk.ended(batch)).counts.completed == 20

    async def test_counts_while_it_runs(self, desk: Desk, eventually: Eventually) -> None:
        """They are written down as lines end."""
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        made = await desk.create(line("a"), line("b"), line("c"))
        await eventually(lambda: len(desk.jobs.open) == 3)
        jobs = list(desk.jobs.open)
        await desk.jobs.finish(jobs[0], Answered(b"{}"))
        await desk.jobs.finish(jobs[1], BackendFailed("no").info)

        await eventually(lambda: desk.stands(made, RequestCounts(total=3, completed=1, failed=1)))
        assert (await desk.batch(made)).status is BatchStatus.IN_PROGRESS
        await desk.jobs.finish(jobs[2], Answered(b"{}"))
        assert (await desk.ended(made)).counts == RequestCounts(total=3, completed=2, failed=1)

    async def test_bad_lines_go_to_the_error_file(self, desk: Desk) -> None:
        """With the status and the error that a synchronous caller would get; the others are answered."""
        await desk.gateway()

        def ends(body: dict[str, Any]) -> Answered | Any:
            return BackendFailed("it broke").info if body["messages"][0]["content"] == "breaks" else echoed(body)

        desk.jobs.ends = ends
        lines = [line("good"), line("streamed", stream=True), line("wrong", messages=3), line("breaks"), line("fine")]
        batch = await desk.ended(await desk.create(*lines))
        assert batch.status is BatchStatus.COMPLETED
        assert batch.counts == RequestCounts(total=5, completed=2, failed=3)
        assert ids(await desk.rows(batch.output_file_id)) == ["good", "fine"]
        errors = await desk.rows(batch.error_file_id)
        assert ids(errors) == ["streamed", "wrong", "breaks"]
        assert [row["response"]["status_code"] for row in errors] == [400, 400, 502]
        assert [row["response"]["body"]["error"]["param"] for row in errors] == ["stream", "messages", None]
        assert all(row["error"] is None for row in errors)

    async def test_a_refused_model_is_the_lines_error(self, desk: Desk) -> None:
        """Not the batch's."""
        await desk.gateway()
        desk.jobs.refusals = [ModelNotFound("no such model", param="model")]
        batch = await desk.ended(await desk.create(line("a")))
        assert (batch.status, batch.output_file_id) == (BatchStatus.COMPLETED, None)
        [row] = await desk.rows(batch.error_file_id)
        assert row["response"]["status_code"] == 404
        assert row["response"]["body"]["error"]["code"] == "model_not_found"

    async def test_what_passes_is_waited_for(self, desk: Desk) -> None:
        """A full queue, a key's limit, a server that is away: no line fails for it."""
        limited = NexusError("limit", info=QueueFull().info.model_copy(update={"code": "rate_limit_exceeded"}))
        desk.jobs.refusals = [QueueFull("full", retry_after_s=0.01), Unavailable("away"), limited] * 5
        await desk.gateway()
        batch = await desk.ended(await desk.create(*[line(f"r{number}") for number in range(10)]))
        assert batch.counts == RequestCounts(total=10, completed=10)

    async def test_redis_away_while_it_runs(self, desk: Desk, eventually: Eventually) -> None:
        """It goes on, and is written down when it is back."""
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        made = await desk.create(*[line(f"r{number}") for number in range(12)])
        await eventually(lambda: len(desk.jobs.open) == 8)
        desk.documents.available = False
        desk.jobs.ends = echoed
        for job in list(desk.jobs.open):
            await desk.jobs.finish(job, Answered(b"{}"))
        await eventually(lambda: len(desk.jobs.runs) == 12)
        desk.documents.available = True
        assert (await desk.ended(made)).counts == RequestCounts(total=12, completed=12)
        assert set(desk.jobs.runs.values()) == {1}

    async def test_a_lost_document_is_made_again(self, desk: Desk, eventually: Eventually) -> None:
        """Redis emptied, before it is taken and while it runs."""
        made = await desk.create(line("a"), line("b"))
        await desk.documents.remove("batch", OWNER, made.id)
        await desk.documents.remove("file", OWNER, made.input_file_id)
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        await eventually(lambda: len(desk.jobs.open) == 2)
        await desk.documents.remove("batch", OWNER, made.id)
        for job in list(desk.jobs.open):
            await desk.jobs.finish(job, Answered(b"{}"))

        await eventually(lambda: desk.documents.get("batch", OWNER, made.id))
        batch = await desk.ended(made)
        assert (batch.status, batch.counts.completed) == (BatchStatus.COMPLETED, 2)


class TestValidation:
    async def test_a_wrong_file_fails_the_batch(self, desk: Desk) -> None:
        """With each wrong line, and without a job."""
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a"), b"{", line("a"), line("b", url="/v1/embeddings")))
        assert batch.status is BatchStatus.FAILED
        assert batch.failed_at is not None
        shown = batch.to_openai()["errors"]
        assert shown["object"] == "list"
        assert [(error["code"], error["line"]) for error in shown["data"]] == [
            ("invalid_json_line", 2),
            ("duplicate_custom_id", 3),
            ("invalid_url", 4),
        ]
        assert desk.jobs.runs == {}

    async def test_an_input_that_is_gone(self, desk: Desk) -> None:
        """It was deleted before it was read."""
        made = await desk.create(line("a"))
        await desk.files.remove(OWNER, made.input_file_id)
        await desk.gateway()
        batch = await desk.ended(made)
        assert (batch.status, [error.code for error in batch.errors]) == (BatchStatus.FAILED, ["input_file_gone"])


class TestAnswers:
    async def one(self, desk: Desk, answer: Answered, *, endpoint: str = CHAT, **body: Any) -> dict[str, Any]:
        desk.jobs.ends = lambda _: answer
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a", url=endpoint, **body), endpoint=endpoint))
        assert batch.output_file_id is not None, await desk.rows(batch.error_file_id)
        [row] = await desk.rows(batch.output_file_id)
        assert row["response"]["status_code"] == 200
        body = row["response"]["body"]
        assert isinstance(body, dict)
        return body

    async def test_a_pretty_answer_is_one_line(self, desk: Desk) -> None:
        """And means the same, to the last digit."""
        value = {"text": "a\nb\r\n\u2028", "number": 12345678901234567890123, "list": [1.10]}
        pretty = json.dumps(value, indent=2, ensure_ascii=False).encode()
        assert await self.one(desk, Answered(pretty, "application/json; charset=utf-8")) == value

    async def test_a_large_answer_is_passed_through(self, desk: Desk) -> None:
        """From its blob."""
        value = {"data": ["x" * 70_000] * 20}
        data = orjson.dumps(value, option=orjson.OPT_INDENT_2)
        assert len(data) > INLINE_LIMIT_BYTES
        assert await self.one(desk, Answered(data)) == value

    @pytest.mark.parametrize("size", [1, 2, 3, 1000, INLINE_LIMIT_BYTES + 100_001])
    async def test_sound_is_base64(self, desk: Desk, size: int) -> None:
        """Byte for byte, small or large."""
        sound = bytes(range(256)) * (size // 256 + 1)
        sound = sound[:size]
        body = await self.one(
            desk, Answered(sound, "audio/mpeg"), endpoint="/v1/audio/speech", input="hello", voice="alloy"
        )
        assert body["content_type"] == "audio/mpeg"
        assert base64.b64decode(body["b64"]) == sound

    @pytest.mark.parametrize("data", [b"[1]", b"no json", b"", b"\xff"])
    async def test_what_is_no_json_object_is_wrapped(self, desk: Desk, data: bytes) -> None:
        """`response.body` is an object, always."""
        body = await self.one(desk, Answered(data))
        assert base64.b64decode(body["b64"]) == data

    async def test_a_result_that_is_lost(self, desk: Desk, eventually: Eventually) -> None:
        """Its line has an error; the other lines have their results."""
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        made = await desk.create(line("large"), line("small"))
        await eventually(lambda: len(desk.jobs.open) == 2)
        large, small = sorted(desk.jobs.open)
        await desk.jobs.finish(large, Answered(orjson.dumps({"x": "y" * INLINE_LIMIT_BYTES})))
        stored = await desk.log.read_outcome(large)
        assert stored is not None
        assert stored.outcome.blob is not None
        desk.blobs.remove(stored.outcome.blob.name)
        await desk.jobs.finish(small, Answered(b"{}"))
        batch = await desk.ended(made)
        assert ids(await desk.rows(batch.output_file_id)) == ["small"]
        [row] = await desk.rows(batch.error_file_id)
        assert (row["custom_id"], row["response"], row["error"]["code"]) == ("large", None, "result_gone")

    async def test_a_form_names_files_by_id(self, desk: Desk) -> None:
        """They stay the caller's."""
        sound = await desk.file(b"RIFF", purpose="user_data", content_type="audio/wav")
        path = "/v1/audio/transcriptions"
        assert await self.one(desk, Answered(b'{"text":"hi"}'), endpoint=path, file=sound.id) == {"text": "hi"}
        [upload] = desk.jobs.uploads
        assert (upload.field, upload.content_type, upload.blob, upload.kept) == ("file", "audio/wav", sound.blob, True)
        assert await desk.blobs.info(sound.blob) is not None

    async def test_output_files_end_as_asked(self, desk: Desk) -> None:
        """`output_expires_after`."""
        await desk.gateway()
        wanted = {"anchor": "created_at", "seconds": 3600}
        batch = await desk.ended(await desk.create(line("a"), output_expires_after=wanted))
        output = await desk.files.open(OWNER, batch.output_file_id or "")
        assert output.expires_at - output.created_at == 3600


class TestEnds:
    async def stuck(self, desk: Desk, eventually: Eventually, **fields: Any) -> Batch:
        """A batch of 20 lines: two complete, eight in progress, ten not submitted."""
        desk.jobs.ends = lambda body: echoed(body) if body["messages"][0]["content"] in {"r0", "r1"} else None
        await desk.gateway()
        made = await desk.create(*[line(f"r{number}") for number in range(20)], **fields)
        await eventually(lambda: len(desk.jobs.open) == 8)
        return made

    async def partial(self, desk: Desk, batch: Batch, code: str) -> None:
        assert batch.counts == RequestCounts(total=20, completed=2, failed=18)
        assert ids(await desk.rows(batch.output_file_id)) == ["r0", "r1"]
        errors = await desk.rows(batch.error_file_id)
        assert ids(errors) == [f"r{number}" for number in range(2, 20)]
        assert {(row["response"], row["error"]["code"]) for row in errors} == {(None, code)}
        assert len(desk.jobs.cancelled) == 8
        assert desk.jobs.open == {}
        assert len(desk.jobs.runs) == 10

    async def test_cancelled(self, desk: Desk, eventually: Eventually) -> None:
        """What runs is stopped, what waits is never run, what was answered is in the output."""
        made = await self.stuck(desk, eventually)
        first = await desk.batches.cancel(OWNER, made.id)
        assert first.status is BatchStatus.CANCELLING
        assert (await desk.batches.cancel(OWNER, made.id)).cancelling_at == first.cancelling_at
        batch = await desk.ended(made)
        assert batch.status is BatchStatus.CANCELLED
        assert batch.cancelled_at is not None
        await self.partial(desk, batch, "batch_cancelled")
        assert await desk.batches.cancel(OWNER, made.id) == batch

    async def test_expired(self, desk: Desk, eventually: Eventually, monkeypatch: pytest.MonkeyPatch) -> None:
        """When its window ends, as OpenAI's."""
        made = await self.stuck(desk, eventually, window="1m")
        later = time.time() + 61
        monkeypatch.setattr("gateway.clock.now", lambda: later)
        batch = await desk.ended(made)
        assert batch.status is BatchStatus.EXPIRED
        assert batch.expired_at is not None
        await self.partial(desk, batch, "batch_expired")

    async def test_cancelled_before_it_begins(self, desk: Desk) -> None:
        """Nothing was run, and there are no files."""
        made = await desk.create(line("a"))
        assert (await desk.batches.cancel(OWNER, made.id)).status is BatchStatus.CANCELLED
        await desk.gateway()
        batch = await desk.ended(made)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == (BatchStatus.CANCELLED, None, None)
        assert desk.jobs.runs == {}

    async def test_cancelled_while_it_is_validated(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same."""

        async def cancelled_meanwhile(*given: Any) -> Any:
            assert (await desk.batches.cancel(OWNER, made.id)).status is BatchStatus.CANCELLING
            return await validate(*given)

        monkeypatch.setattr(executor, "validate", cancelled_meanwhile)
        made = await desk.create(line("a"))
        await desk.gateway()
        batch = await desk.ended(made)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == (BatchStatus.CANCELLED, None, None)
        assert desk.jobs.runs == {}

    async def test_one_that_nobody_will_run_expires(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its maker was killed before it was in the line."""
        made = await desk.create(line("a"), window="1m")
        later = time.time() + 60 + PICKUP_GRACE_S + 1
        monkeypatch.setattr("gateway.clock.now", lambda: later)
        assert (await desk.batch(made)).status is BatchStatus.EXPIRED
        await desk.gateway()
        assert (await desk.ended(made)).status is BatchStatus.EXPIRED
        assert desk.jobs.runs == {}

    async def test_a_large_line_of_another_batch_does_not_hold_up_a_cancel(
        self, desk: Desk, eventually: Eventually
    ) -> None:
        """That one waits for room in the queue, this one for its turn to be in memory."""
        desk.jobs.refusals = [QueueFull("full")] * 10_000
        await desk.gateway()
        large = [line(f"r{number}", padding="x" * executor.LARGE_LINE_BYTES) for number in range(2)]
        await desk.create(*large)
        await eventually(desk.dependencies.large.locked)
        made = await desk.create(*large)
        await eventually(lambda: desk.is_in(made, BatchStatus.IN_PROGRESS))
        await desk.batches.cancel(OWNER, made.id)
        batch = await desk.ended(made)
        assert (batch.status, batch.counts) == (BatchStatus.CANCELLED, RequestCounts(total=2, failed=2))

    async def test_an_ended_batch_is_not_cancelled(self, desk: Desk) -> None:
        """400, as OpenAI's."""
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a")))
        with pytest.raises(InvalidRequest) as raised:
            await desk.batches.cancel(OWNER, batch.id)
        assert raised.value.info.status == 400

    async def test_the_input_goes_while_it_runs(self, desk: Desk, eventually: Eventually) -> None:
        """Without its input the batch fails, and its jobs are cancelled."""
        made = await self.stuck(desk, eventually)
        await desk.files.remove(OWNER, made.input_file_id)
        for job in list(desk.jobs.open):
            await desk.jobs.finish(job, Answered(b"{}"))
        desk.jobs.ends = echoed
        batch = await desk.ended(made)
        assert (batch.status, [error.code for error in batch.errors]) == (BatchStatus.FAILED, ["input_file_gone"])


class TestTakingOver:
    @pytest.fixture(autouse=True)
    def short_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scheduler, "ACK_WAIT_S", 0.2)

    async def test_lines_that_are_done_are_not_run_again(self, desk: Desk, eventually: Eventually) -> None:
        """The next gateway finds what is decided, waits for what runs, and begins the rest."""
        desk.jobs.ends = lambda body: echoed(body) if body["messages"][0]["content"] < "r05" else None
        await desk.gateway()
        made = await desk.create(*[line(f"r{number:02}") for number in range(30)])
        await eventually(lambda: len(desk.jobs.open) == 8)
        await desk.runners[0].close()
        await desk.gateway()
        desk.jobs.ends = echoed
        await asyncio.sleep(0)
        for job in list(desk.jobs.open):
            await desk.jobs.finish(job, Answered(b"{}"))
        batch = await desk.ended(made)
        assert batch.counts == RequestCounts(total=30, completed=30)
        assert set(desk.jobs.runs.values()) == {1}
        assert ids(await desk.rows(batch.output_file_id)) == [f"r{number:02}" for number in range(30)]

    async def test_a_gateway_that_was_cut_off_stops(self, desk: Desk, eventually: Eventually) -> None:
        """Another gateway has taken the batch over and is not disturbed."""
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        made = await desk.create(*[line(f"r{number}") for number in range(3)])
        await eventually(lambda: len(desk.jobs.open) == 3)
        stale = await desk.batch(made)

        def taken(batch: Batch) -> Batch:
            return batch.model_copy(update={"runner": "another"})

        await desk.repository.change(OWNER, made.id, taken)
        await eventually(lambda: not desk.runners[0]._tasks)
        now = await desk.batch(made)
        assert (now.runner, now.status, stale.runner != "another") == ("another", BatchStatus.IN_PROGRESS, True)
        assert desk.jobs.cancelled == []

    async def test_cancelling_is_taken_over_too(self, desk: Desk, eventually: Eventually) -> None:
        """What the dead gateway had submitted is cancelled."""
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        made = await desk.create(*[line(f"r{number}") for number in range(12)])
        await eventually(lambda: len(desk.jobs.open) == 8)
        await desk.runners[0].close()
        await desk.batches.cancel(OWNER, made.id)
        await desk.gateway()
        batch = await desk.ended(made)
        assert (batch.status, batch.counts) == (BatchStatus.CANCELLED, RequestCounts(total=12, failed=12))
        assert desk.jobs.open == {}
        assert {row["error"]["code"] for row in await desk.rows(batch.error_file_id)} == {"batch_cancelled"}

    async def test_files_that_were_written_already_are_written_over(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A gateway killed before the final status: there is one file of each kind, without leftovers."""
        change, broken = desk.repository.change, False

        async def break_once(owner: str, batch_id: str, wanted: Any) -> Batch:
            nonlocal broken

            def checked(batch: Batch) -> Batch:
                nonlocal broken
                new: Batch = wanted(batch)
                if new.is_final and not broken:
                    broken = True
                    raise Unavailable
                return new

            return await change(owner, batch_id, checked)

        monkeypatch.setattr(desk.repository, "change", break_once)
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a"), line("b", messages=3)))
        assert broken
        found, _ = await desk.files.page(OWNER, after="", limit=10, newest_first=True, purpose="batch_output")
        assert {file.id for file in found} == {batch.output_file_id, batch.error_file_id}
        assert ids(await desk.rows(batch.output_file_id)) == ["a"]
        assert ids(await desk.rows(batch.error_file_id)) == ["b"]
        assert len(desk.blobs.chunks_by_name()) == 3

    async def test_a_defect_ends_a_batch_in_the_end(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is tried again, and not forever."""
        monkeypatch.setattr(scheduler, "DEFECT_RETRY_DELAY_S", 0.01)
        monkeypatch.setattr(scheduler, "MAX_DEFECT_DELIVERIES", 3)

        def broken(_body: dict[str, Any]) -> Any:
            raise RuntimeError("a defect")

        desk.jobs.ends = broken
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a")))
        assert (batch.status, [error.code for error in batch.errors]) == (BatchStatus.FAILED, ["internal_error"])
        assert len(desk.jobs.submitted) == 3


async def test_a_job_that_only_the_queue_knows_is_decided_too(desk: Desk) -> None:
    """Cancelled, so that it never runs."""
    batch = await desk.create(line("a"))
    jobs = line_jobs.LineJobRunner(batch, desk.dependencies, line_jobs.BatchSignals())
    await jobs.cancel(job_id(batch.id, 1))
    assert await jobs.read_status(job_id(batch.id, 1)) is JobStatus.CANCELLED


@pytest.mark.parametrize("stopped", [True, False])
async def test_a_job_whose_end_was_dropped_is_waited_for_no_longer(
    desk: Desk, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome was dropped because the stream is full; the record still has the status."""
    monkeypatch.setattr(line_jobs, "OUTCOME_WAIT_S", 0.01)
    batch, signals = await desk.create(line("a")), line_jobs.BatchSignals()
    job = job_id(batch.id, 1)
    desk.jobs.forgotten[job] = JobRecord(
        job=job,
        owner=batch.owner,
        endpoint=batch.endpoint,
        model="m",
        public_model="m",
        created_at=1,
        status=JobStatus.COMPLETED,
    )
    if stopped:
        signals.stop()
    async with asyncio.timeout(10):
        assert await line_jobs.LineJobRunner(batch, desk.dependencies, signals).wait(job) is JobStatus.COMPLETED


class TestSharing:
    async def test_batches_without_a_worker_hold_up_no_other_owner(self, desk: Desk) -> None:
        """More than a gateway runs of one owner: another owner's batch ends meanwhile."""
        desk.jobs.ends = lambda body: None if body["model"] == "dead" else echoed(body)
        dead = [await desk.create(line("a", model="dead"), caller=Principal("evil")) for _ in range(20)]
        await desk.gateway()
        batch = await desk.ended(await desk.create(line("a")))
        assert batch.status is BatchStatus.COMPLETED
        states = [(await desk.batches.get("evil", one.id)).status for one in dead]
        assert states.count(BatchStatus.VALIDATING) >= len(dead) - scheduler.MAX_CONCURRENCY_PER_OWNER

    async def test_a_team_has_so_many_unfinished_batches(self, desk: Desk) -> None:
        """One more is refused, and leaves nothing; one that ends makes room."""
        caller = Principal(OWNER, limits=EffectiveLimits(batches=1))
        first = await desk.create(line("a"), caller=caller)
        with pytest.raises(RateLimited, match="1 unfinished"):
            await desk.create(line("a"), caller=caller)
        assert [batch.id for batch in await desk.batches.unfinished(OWNER)] == [first.id]
        await desk.batches.cancel(OWNER, first.id)
        await desk.create(line("a"), caller=caller)


class TestStorage:
    async def test_results_of_unfinished_batches_are_bounded(self, desk: Desk, eventually: Eventually) -> None:
        """Lines without room for their results fail with an error; what was answered is in the output, and the next batch has room."""
        desk.limits = EffectiveLimits(result_bytes=300_000)
        desk.jobs.ends = lambda body: Answered(orjson.dumps({"data": "x" * 100_000}))
        await desk.gateway()
        for _ in range(2):
            batch = await desk.ended(await desk.create(*(line(f"l{number}") for number in range(12))))
            assert batch.status is BatchStatus.COMPLETED
            answered, refused = await desk.rows(batch.output_file_id), await desk.rows(batch.error_file_id)
            assert len(answered) + len(refused) == 12
            assert 2 <= len(answered) <= 5
            assert {row["response"]["body"]["error"]["code"] for row in refused} == {"storage_limit_reached"}
            await eventually(lambda: not desk.result_quotas.used(OWNER))

    async def test_lines_wait_for_other_batches(self, desk: Desk, eventually: Eventually) -> None:
        """Two batches that have room one after the other both complete."""
        desk.limits = EffectiveLimits(result_bytes=150_000)
        desk.jobs.ends = lambda _: None
        await desk.gateway()
        first = await desk.create(line("a"), line("b"))
        await eventually(lambda: len(desk.jobs.open) == 2)
        second = await desk.create(line("c"))
        await eventually(lambda: desk.stands(second, RequestCounts(total=1)))
        assert len(desk.jobs.open) == 2
        desk.jobs.ends = lambda _: Answered(b"{}")
        for job in list(desk.jobs.open):
            await desk.jobs.finish(job, Answered(b"{}"))
        for batch in (first, second):
            ended = await desk.ended(batch)
            assert (ended.counts.completed, ended.counts.failed) == (ended.counts.total, 0)

    async def test_no_batch_begins_above_the_limit_of_files(self, desk: Desk) -> None:
        """Its output would be stored with them."""
        caller = Principal(OWNER, limits=EffectiveLimits(stored_bytes=5000))
        await desk.create(line("a"), caller=caller)
        await desk.file(b"x" * 10_000)
        with pytest.raises(StorageFull, match="Delete some of the files"):
            await desk.create(line("b"), caller=caller)
        await desk.create(line("c"), caller=Principal("bob", limits=caller.limits))
