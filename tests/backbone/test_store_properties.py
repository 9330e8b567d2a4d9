"""The store beside a plain model of it: whatever is done in whatever order, both say the same.

The model is written from the promises in `backbone.store.store`, and shares no code with the stores.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from backbone.store.redis import RedisStore
from backbone.store.store import IllegalMove, JobLimit, LimitReached, Store
from backbone.testing.store import MemoryStore, list_jobs
from schemas.jobs import JobRecord, JobStatus

T = TypeVar("T")

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED, EXPIRED = JobStatus
ENDS = {COMPLETED, FAILED, CANCELLED, EXPIRED}
STEPS = {
    QUEUED: {RUNNING, *ENDS},
    RUNNING: {QUEUED, RUNNING, *ENDS},
    FAILED: set(),
    COMPLETED: set(),
    CANCELLED: set(),
    EXPIRED: set(),
}
"""What may follow what within one run: written out, so that a change of the table in `schemas.jobs` is noticed here."""

JOBS = st.sampled_from(["job_1", "job_2", "job_3"])
KEYS = st.sampled_from(["", "key_1", "key_2"])
STATUSES = st.sampled_from([QUEUED, RUNNING, FAILED, QUEUED, RUNNING, FAILED, COMPLETED, CANCELLED, EXPIRED])
"""More of those from which a job goes on."""
DUE = st.sampled_from([None, 0, 3600])
RUNS = st.sampled_from([None, -1, 0, 0, 1, 2])
"""Of a move: not named, or so many runs behind or ahead of the record's."""
MOVES = st.lists(st.tuples(JOBS, STATUSES, RUNS, DUE), min_size=4, max_size=16)
"""Many at once: most of what comes to mind is illegal."""


@dataclass(frozen=True)
class Model:
    """What is known of a job."""

    key: str
    status: JobStatus = QUEUED
    run: int = 1
    attempts: int = 0
    due: bool = False
    """Its timer has run out."""

    def may_move(self, to: JobStatus, run: int) -> bool:
        if run == self.run:
            return to in STEPS[self.status]
        return run > self.run and self.status in {QUEUED, RUNNING, FAILED}


class StoreMachine(RuleBasedStateMachine):
    """Random calls, each compared with the model at once, and all that is counted, listed and timed after each."""

    store: Store

    def __init__(self, loop: asyncio.AbstractEventLoop, opened: Callable[[], Store]) -> None:
        super().__init__()
        self.loop = loop
        self.store = opened()
        self.jobs: dict[str, Model] = {}
        self.attempts = 0

    @initialize()
    def begin(self) -> None:
        """Owner and keys are this example's own: all examples share a Redis."""
        self.owner = uuid.uuid4().hex
        self.create("job_1", "key_1", None, None)
        self.create("job_2", "key_2", 0, None)

    def do(self, call: Awaitable[T]) -> T:
        async def wait() -> T:
            return await call

        return self.loop.run_until_complete(wait())

    def key(self, name: str) -> str:
        return f"{self.owner}{name}"

    def count(self, key: str, status: JobStatus) -> int:
        return sum(job.key == key and job.status is status for job in self.jobs.values())

    @rule(job=JOBS, key=KEYS, due_s=DUE, limit=st.sampled_from([None, 0, 1, 2]))
    def create(self, job: str, key: str, due_s: float | None, limit: int | None) -> None:
        record = JobRecord(
            job=job, owner=self.owner, endpoint="/v1/x", model="m", public_model="m", created_at=1, key=self.key(key)
        )
        call = self.store.create(record, ttl_s=3600, due_s=due_s, max_queued=JobLimit(limit))
        if job in self.jobs:
            assert not self.do(call)
        elif limit is not None and self.count(key, QUEUED) >= limit:
            with pytest.raises(LimitReached):
                self.do(call)
        else:
            assert self.do(call)
            self.jobs[job] = Model(key, due=due_s == 0)

    @rule(moves=MOVES)
    def moves(self, moves: list[tuple[str, JobStatus, int | None, float | None]]) -> None:
        """Jobs for which nothing is left to do make way for others first."""
        for job in [job for job, model in self.jobs.items() if model.status in ENDS - {FAILED}]:
            self.begin_anew(job, self.jobs[job].key, None)
        for move in moves:
            self.move(*move)

    def move(self, job: str, to: JobStatus, ahead: int | None, due_s: float | None) -> None:
        model = self.jobs.get(job)
        run = (model.run if model else 1) + (ahead or 0)
        changes: dict[str, Any] = {} if ahead is None else {"run": run}
        if to is RUNNING:
            self.attempts += 1
            changes["attempts"] = self.attempts
        call = self.store.move(self.owner, job, to, due_s=due_s, **changes)
        if model is None:
            assert self.do(call) is None
        elif not model.may_move(to, run):
            with pytest.raises(IllegalMove):
                self.do(call)
        else:
            assert self.do(call) is not None
            kept = model.attempts if run == model.run else 0
            attempts = changes.get("attempts", kept)
            self.jobs[job] = Model(model.key, to, run, attempts, due=due_s == 0 and to not in ENDS)

    @rule(job=JOBS, due_s=DUE, key=st.none() | KEYS, behind=st.sampled_from([None, 0, 1]))
    def update(self, job: str, due_s: float | None, key: str | None, behind: int | None) -> None:
        model = self.jobs.get(job)
        changes: dict[str, Any] = {} if key is None else {"key": self.key(key)}
        if behind is not None:
            changes["run"] = (model.run if model else 1) - behind
        call = self.store.update(self.owner, job, due_s=due_s, **changes)
        if model is None:
            assert self.do(call) is None
        elif behind:
            with pytest.raises(IllegalMove):
                self.do(call)
        else:
            assert self.do(call) is not None
            timed = due_s is not None and model.status not in ENDS
            self.jobs[job] = replace(
                model, key=model.key if key is None else key, due=due_s == 0 if timed else model.due
            )

    @rule(job=JOBS, ends=st.lists(st.sampled_from(sorted(ENDS)), min_size=2, max_size=4, unique=True))
    def race_to_the_end(self, job: str, ends: list[JobStatus]) -> None:
        """Of those who end a job at the same time one succeeds, if the job can end at all."""
        model = self.jobs.get(job)
        if model is None:
            return

        async def race() -> list[JobRecord | BaseException | None]:
            moves = (self.store.move(self.owner, job, end) for end in ends)
            return await asyncio.gather(*moves, return_exceptions=True)

        results = self.do(race())
        won = [result for result in results if isinstance(result, JobRecord)]
        assert all(isinstance(result, IllegalMove) for result in results if result not in won)
        assert len(won) == (1 if model.status in {QUEUED, RUNNING} else 0)
        for record in won:
            self.jobs[job] = replace(model, status=record.status, due=False)

    @rule(job=JOBS, key=KEYS, due_s=DUE)
    def begin_anew(self, job: str, key: str, due_s: float | None) -> None:
        """Nothing that was known of a removed job is known of one that comes in its place."""
        self.do(self.store.remove(self.owner, job))
        self.jobs.pop(job, None)
        self.the_list_holds_what_there_is()
        self.create(job, key, due_s, None)

    @rule()
    def give_out_what_is_due(self) -> None:
        due = {given.job for given in self.do(self.store.claim_due(10_000)) if given.owner == self.owner}
        assert due == {job for job, model in self.jobs.items() if model.due}
        self.jobs = {job: replace(model, due=False) for job, model in self.jobs.items()}

    @invariant()
    def the_list_holds_what_there_is(self) -> None:
        if not hasattr(self, "owner"):
            return
        listed = self.do(list_jobs(self.store, self.owner))
        assert [record.job for record in listed] == sorted(self.jobs, reverse=True)
        for record in listed:
            model = self.jobs[record.job]
            assert (record.status, record.run, record.attempts) == (model.status, model.run, model.attempts)
            assert record.key == self.key(model.key)

    @invariant()
    def counts_agree_with_statuses(self) -> None:
        if hasattr(self, "owner"):
            self.do(self._counts_agree())

    async def _counts_agree(self) -> None:
        """Waiting jobs are counted where a create fails at exactly that limit."""
        for key in ("", "key_1", "key_2"):
            assert await self.store.count_running(self.key(key)) == self.count(key, RUNNING)
            waiting = self.count(key, QUEUED)
            probe = JobRecord(
                job="job_9",
                owner=self.owner,
                endpoint="/",
                model="m",
                public_model="m",
                created_at=1,
                key=self.key(key),
            )
            with pytest.raises(LimitReached):
                await self.store.create(probe, ttl_s=3600, max_queued=JobLimit(waiting))
            assert await self.store.create(probe, ttl_s=3600, max_queued=JobLimit(waiting + 1))
            await self.store.remove(self.owner, probe.job)

    def teardown(self) -> None:
        self.do(self.store.close())


def check(opened: Callable[[], Store], examples: int) -> None:
    with asyncio.Runner() as runner:
        run_state_machine_as_test(
            # Hypothesis calls it without arguments, for which a function does as well as a class.
            cast("type[StoreMachine]", lambda: StoreMachine(runner.get_loop(), opened)),
            settings=settings(
                max_examples=examples,
                stateful_step_count=15,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],  # shrinking such long examples takes minutes
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_the_store_in_memory_does_what_the_model_does():
    check(MemoryStore, 60)


def test_the_store_on_redis_does_what_the_model_does(own_redis):
    check(lambda: RedisStore(own_redis.url, timeout_s=30), 30)
