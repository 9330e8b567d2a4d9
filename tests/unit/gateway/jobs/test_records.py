"""Conversions between records, envelopes and outcomes, and the estimate of a job's end."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.ids import new_job_id
from backbone.testing.store import MemoryStore
from gateway.jobs import records
from gateway.jobs.api import JobEvent
from gateway.jobs.estimator import EtaEstimator
from gateway.jobs.records import (
    id_created_at,
    new_record,
    outcome_fields,
    queue_deadline,
    record_from_outcome,
    seconds_until_due,
    with_outcome,
)
from gateway.routes.jobs import event_frame
from schemas.errors import BackendFailed, DeadlineExceeded
from schemas.frames import BlobRef, Frame, decode_frame, encode_frame
from schemas.job_events import EventId, JobEventKind
from schemas.jobs import (
    TERMINAL_STATUSES,
    Capability,
    Envelope,
    JobRecord,
    JobStatus,
    Lane,
    Upload,
    Usage,
    WebhookState,
)
from schemas.outcome import Outcome, outcome_of
from schemas.presence import ModelOffer, RegistrySnapshot, WorkerPresence, WorkerState

AT = 1_800_000_000
QUEUED, RUNNING = JobStatus.QUEUED, JobStatus.IN_PROGRESS

texts = st.text(max_size=20)
payloads = st.one_of(st.binary(max_size=50), st.just(b"\n\n"), st.just(b'{"a": 1}\n{"b"'))
usages = st.none() | st.builds(Usage, prompt_tokens=st.integers(0, 9), cached=st.integers(0, 9))
errors = st.none() | st.builds(lambda text: BackendFailed(text or None, param="p", retry_after_s=1.5).info, texts)
metadata = st.dictionaries(texts, texts, max_size=3)
envelopes = st.builds(
    Envelope,
    job=st.builds(new_job_id),
    run=st.integers(1, 5),
    request_id=texts,
    endpoint=st.just("/v1/chat/completions"),
    capability=st.sampled_from(Capability),
    lane=st.sampled_from(Lane),
    model=st.sampled_from(["m", "org/m:tag", "模型"]),
    public_model=st.sampled_from(["m", "alias"]),
    stream=st.booleans(),
    reply=st.just("nexus.events.x"),
    owner=texts,
    metadata=metadata,
    shown_endpoint=st.sampled_from(["", "/v1/responses"]),
    key=texts,
    webhook=st.sampled_from(["", "https://example.com/hook"]),
    batch=texts,
    body_blob=st.sampled_from([None, "body"]),
    uploads=st.sampled_from(
        [(), (Upload(field="file", size=3, blob="mine"), Upload(field="mask", size=3, blob="kept", kept=True), Upload(field="image", size=1))]
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is `AT`."""
    monkeypatch.setattr(records, "now", lambda: AT)
    monkeypatch.setattr("gateway.jobs.estimator.now", lambda: AT)


def job(**fields: Any) -> JobRecord:
    plain = {
        "job": new_job_id(),
        "owner": "o",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "public_model": "m",
        "created_at": AT - 100,
    }
    return JobRecord(**plain | fields)


class TestOutcomes:
    @settings(max_examples=50)
    @given(envelopes, st.sampled_from(sorted(TERMINAL_STATUSES)), usages, errors, payloads)
    def test_an_outcome_survives_encoding(
        self, envelope: Envelope, status: JobStatus, usage: Usage | None, error: Any, payload: bytes
    ) -> None:
        """Whatever its payload holds, lines among them."""
        outcome = outcome_of(
            envelope, status, usage=usage, error=error, blob=BlobRef(name="n", size=5), seconds=0.25, dead=True
        )
        assert Outcome.decode(outcome.encode(payload)) == (outcome, payload)

    @pytest.mark.parametrize("data", [b"", b"{}", b"{}\n", b"\n", b'{"job": "x"}\n', b"\xff\n", b"[]\npayload"])
    def test_a_malformed_outcome_is_a_value_error(self, data: bytes) -> None:
        with pytest.raises(ValueError):
            Outcome.decode(data)

    @settings(max_examples=50)
    @given(envelopes)
    def test_an_outcome_names_the_uploads_of_its_job(self, envelope: Envelope) -> None:
        """Blobs that came with the request; never files that the caller has uploaded for more than this job."""
        blobs = set(outcome_of(envelope, JobStatus.COMPLETED).uploads)
        assert blobs == ({"body"} if envelope.body_blob else set()) | ({"mine"} if envelope.uploads else set())

    @settings(max_examples=50)
    @given(envelopes)
    def test_a_lost_record_is_rebuilt_from_the_outcome(self, envelope: Envelope) -> None:
        """As far as a caller can see, it is the record that was lost."""
        first = new_record(envelope, queue_s=60, expires_at=None)
        outcome = outcome_of(
            envelope, JobStatus.COMPLETED, token="t", worker="w", attempts=2, usage=Usage(total_tokens=3)
        )
        rebuilt, recorded = record_from_outcome(outcome), with_outcome(first, outcome)
        made = id_created_at(envelope.job)
        assert made is not None
        assert abs(made - time.time()) < 60
        assert rebuilt == recorded.model_copy(update={"created_at": made, "queue_s": rebuilt.queue_s})
        assert (recorded.attempts, recorded.worker, recorded.progress) == (2, "w", 1.0)

    @settings(max_examples=50)
    @given(envelopes, st.sampled_from([JobStatus.CANCELLED, JobStatus.EXPIRED]), errors)
    def test_a_gateway_says_of_a_job_what_a_worker_would(
        self, envelope: Envelope, status: JobStatus, error: Any
    ) -> None:
        """Beside what only the attempt knows; also which blobs go with the job."""
        record = new_record(envelope, queue_s=60, expires_at=None)
        outcome = outcome_of(record, status, error=error)
        assert outcome == outcome_of(envelope, status, error=error, seal="")


class TestRecords:
    def test_an_end_that_no_worker_made_leaves_what_is_known_of_it(self) -> None:
        running = job(status=RUNNING, worker="w", attempts=2, progress=0.5, started_at=AT - 5)
        after = with_outcome(running, outcome_of(running, JobStatus.CANCELLED))
        assert (after.status, after.worker, after.attempts, after.progress) == (JobStatus.CANCELLED, "w", 2, None)
        assert after.finished_at == AT

    def test_a_record_that_has_ended_stays_as_it_is(self) -> None:
        """A later outcome does not change it."""
        done = job(status=JobStatus.COMPLETED, finished_at=AT - 50)
        assert with_outcome(done, outcome_of(done, JobStatus.CANCELLED)) == done

    def test_an_error_is_recorded_as_callers_see_it(self) -> None:
        """OpenAI's object, without what is only for headers."""
        error = DeadlineExceeded("too late", retry_after_s=4).info
        assert outcome_fields(outcome_of(job(), JobStatus.EXPIRED, error=error))["error"] == {
            "message": "too late", "type": "timeout_error", "param": None, "code": "timeout",
        }  # fmt: skip

    def test_a_webhook_starts_as_pending(self) -> None:
        envelope = Envelope(
            job="job_" + "0" * 32, request_id="r", endpoint="/", capability=Capability.CHAT, model="m", public_model="m",
            reply="x", webhook="https://example.com",
        )  # fmt: skip
        assert new_record(envelope, queue_s=1, expires_at=None).webhook_state == WebhookState(url="https://example.com")

    @pytest.mark.parametrize("number", [0, (1 << 128) - 1, 0x4 << 76 | 0x2 << 62, 0x7 << 76])
    def test_an_id_that_was_not_made_by_a_clock_has_no_time(self, number: int) -> None:
        """Ids that derive from other values have no creation time."""
        assert id_created_at(f"job_{number:032x}") is None

    def test_the_queue_limit_restarts_when_a_job_returns_to_the_queue(self) -> None:
        assert queue_deadline(job(queue_s=60)) == AT - 40
        assert queue_deadline(job(queue_s=60, queued_at=AT - 10)) == AT + 50

    @pytest.mark.parametrize(
        ("record", "to", "seconds"),
        [
            (job(queue_s=160), QUEUED, 60),
            (job(queue_s=60), QUEUED, 0),
            (job(queue_s=160, queued_at=AT - 10), QUEUED, 150),
            (job(queue_s=160, status=RUNNING), QUEUED, 160),
            (job(queue_s=160, status=JobStatus.FAILED), QUEUED, 160),
            (job(queue_s=160), RUNNING, 45),
            (job(queue_s=160, expires_at=AT + 7), RUNNING, 7),
            (job(queue_s=160, expires_at=AT + 7), QUEUED, 7),
            (job(queue_s=160, expires_at=AT - 7), RUNNING, 0),
            (job(queue_s=160, expires_at=AT + 1000), QUEUED, 60),
        ],
    )
    def test_when_somebody_should_look_again(self, record: JobRecord, to: JobStatus, seconds: float) -> None:
        assert seconds_until_due(record, to, 45) == seconds


class TestEvents:
    @given(
        st.sampled_from("qscrpb"),
        st.integers(0, 2**40),
        st.integers(0, 2**40),
        st.integers(0, 2**40),
        st.text("0123456789abcdef-", min_size=1, max_size=12),
        payloads,
    )
    def test_a_frame_comes_back_as_it_was(
        self, kind: str, run: int, delivery: int, seq: int, token: str, payload: bytes
    ) -> None:
        frame = Frame(kind, run, delivery, seq, token, payload)
        assert decode_frame(encode_frame(*frame[:6])) == frame
        assert EventId.parse(frame.id) == (run, delivery, seq)

    @given(st.binary(max_size=40))
    def test_what_is_no_frame_is_a_value_error(self, data: bytes) -> None:
        try:
            frame = decode_frame(data)
        except ValueError:
            return
        assert decode_frame(encode_frame(*frame[:6])) == frame

    def test_ids_sort_by_run_delivery_and_number(self) -> None:
        """Not as texts."""
        ids = ["1-0-0", "1-1-0", "1-1-9", "1-1-10", "1-2-0", "1-10-0", "2-0-0", "10-0-0"]
        assert sorted(ids, key=EventId.parse) == ids

    @pytest.mark.parametrize("text", ["1", "1-2", "1-2-3-4", "a-b-c", "1-2-", "--", "-1-2-3"])
    def test_what_is_no_id_is_a_value_error(self, text: str) -> None:
        with pytest.raises(ValueError):
            EventId.parse(text)

    @pytest.mark.parametrize(
        ("kind", "data", "shown"),
        [
            (JobEventKind.CHUNK, b'data: {"a": 1}\n\n', b'data: {"a": 1}'),
            (JobEventKind.CHUNK, b'data:{"a": 1}\n\n', b'data: {"a": 1}'),
            (JobEventKind.CHUNK, b'event: x\nid: 5\ndata: {"a": 1}\n\n', b'data: {"a": 1}'),
            (JobEventKind.CHUNK, b'data: {"a":\r\ndata: 1}\r\n\r\n', b'data: {"a":\ndata: 1}'),
            (JobEventKind.CHUNK, b"ID3\x00sound\n\ndata: x", b'data: {"b64":"SUQzAHNvdW5kCgpkYXRhOiB4"}'),
            (JobEventKind.PROGRESS, b'{"fraction":0.5}', b'data: {"fraction":0.5}'),
            (JobEventKind.QUEUED, b'{"id":"job_1"}', b'data: {"id":"job_1"}'),
        ],
    )
    def test_an_event_as_it_is_sent(self, kind: JobEventKind, data: bytes, shown: bytes) -> None:
        """Its name, its id, and JSON: of a stream of text the endpoint's own, of sound its bytes."""
        frame = event_frame(JobEvent(kind, "1-2-3", data))
        assert frame == b"event: %b\nid: 1-2-3\n%b\n\n" % (kind.value.encode(), shown)


@dataclasses.dataclass
class Outlook:
    """What the registry shows."""

    snapshot: RegistrySnapshot | None = None

    def show(self, *workers: tuple[int, WorkerState, str, Capability]) -> None:
        shown = {
            f"w{number}": WorkerPresence(
                id=f"w{number}", backend="b", host="h", slots=slots, state=state,
                models=(ModelOffer(name=name, capabilities=(capability,)),),
            )
            for number, (slots, state, name, capability) in enumerate(workers)
        }  # fmt: skip
        self.snapshot = RegistrySnapshot(workers=shown)


class TestEstimates:
    ready = (2, WorkerState.READY, "m", Capability.CHAT)

    @pytest.fixture
    def outlook(self) -> Outlook:
        return Outlook()

    @pytest.fixture
    async def store(self) -> MemoryStore:
        store = MemoryStore()
        await store.record_service_time("chat", "m", 10.0)
        return store

    @pytest.fixture
    def eta(self, store: MemoryStore, outlook: Outlook) -> Any:
        return EtaEstimator(store, lambda: outlook.snapshot).eta_s

    @pytest.mark.parametrize(("place", "seconds"), [(0, 20.0), (1, 20.0), (2, 30.0), (7, 50.0)])
    async def test_of_a_job_that_waits(self, eta: Any, outlook: Outlook, place: int, seconds: float) -> None:
        """Those before it, as many at once as there are slots, the one that runs, and itself."""
        outlook.show(self.ready)
        assert await eta(job(), place) == seconds

    async def test_only_workers_that_can_take_it_count(self, eta: Any, outlook: Outlook) -> None:
        outlook.show(
            (9, WorkerState.DRAINING, "m", Capability.CHAT),
            (9, WorkerState.READY, "other", Capability.CHAT),
            (9, WorkerState.READY, "m", Capability.SPEECH),
        )
        assert await eta(job(), 3) is None
        outlook.show(self.ready, (1, WorkerState.READY, "m", Capability.CHAT))
        assert await eta(job(), 3) == 30.0

    async def test_without_data_there_is_no_estimate(self, eta: Any, outlook: Outlook) -> None:
        """No registry yet, no place, no job of this model ever done, no start."""
        assert await eta(job(), 0) is None
        outlook.show(self.ready, (1, WorkerState.READY, "new", Capability.CHAT))
        assert await eta(job(), None) is None
        assert await eta(job(public_model="alias", model="new"), 0) is None
        assert await eta(job(status=RUNNING), None) is None
        assert await eta(job(status=RUNNING, model="new", started_at=AT - 5), None) is None

    async def test_an_alias_is_estimated_by_the_model_behind_it(self, eta: Any, outlook: Outlook) -> None:
        outlook.show(self.ready)
        assert await eta(job(public_model="alias", model="m"), 0) == 20.0

    @pytest.mark.parametrize(
        ("spent", "progress", "seconds"),
        [(4, None, 6.0), (40, None, 0.0), (6, 0.25, 18.0), (6, 1.0, 0.0), (4, 0.0, 6.0)],
    )
    async def test_of_a_job_that_runs(self, eta: Any, spent: int, progress: float | None, seconds: float) -> None:
        """By the reported progress, else by the service times of other jobs; never negative."""
        assert await eta(job(status=RUNNING, started_at=AT - spent, progress=progress), None) == seconds
