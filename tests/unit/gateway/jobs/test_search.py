"""Finding jobs, exporting them, and changing many at once."""

from __future__ import annotations

import asyncio
import csv
import io
from typing import Any

import orjson
import pytest

from backbone.testing.store import MemoryStore
from gateway.batches.input_file import job_id, line_jobs
from gateway.job_requests import BulkRequest, GroupRequest, TeamBulkRequest
from gateway.jobs.bulk import change_all
from gateway.jobs.dead_letter_groups import find_letters, group_letters
from gateway.jobs.export import csv_table, json_lines
from gateway.jobs.query import parse_job_query
from gateway.jobs.records import job_object
from gateway.jobs.search import JobSearch
from schemas.errors import InvalidRequest
from schemas.job_fields import JOB_FIELDS
from schemas.jobs import JobRecord, JobStatus
from tests.unit.gateway.jobs.rig import OWNER, Rig


def query(*pairs: tuple[str, str], limit: int = 20):
    return parse_job_query(pairs, fields=JOB_FIELDS, for_operator=False, id_slack_s=86_400, limits=(limit, 1_000_000))


async def filled(*records: JobRecord) -> JobSearch:
    store = MemoryStore()
    for one in records:
        await store.create(one, ttl_s=60)
    return JobSearch(store, lambda person: [person, "key_1"], id_slack_s=86_400)


def record(number: int, owner: str = "a", **fields: Any) -> JobRecord:
    defaults = {"endpoint": "/v1/chat/completions", "model": "m", "public_model": "m", "created_at": number}
    return JobRecord.model_validate(defaults | {"job": f"job_{number:032x}", "owner": owner} | fields)


async def test_pages_follow_each_other_and_end() -> None:
    search = await filled(*(record(number) for number in range(1, 6)), record(9, "b"))
    first = await search.page("a", ["a"], query(limit=3))
    assert [one.created_at for one in first.records] == [5, 4, 3]
    rest = await search.page("a", ["a"], query(("after", first.after), limit=2))
    assert ([one.created_at for one in rest.records], rest.after) == ([2, 1], "")
    oldest = await search.page("a", None, query(("order", "asc"), limit=1))
    assert oldest.records[0].created_at == 1


async def test_a_persons_jobs_are_those_of_the_person_and_of_the_keys() -> None:
    search = await filled(record(1, key="per_1"), record(2, key="key_1"), record(3, key="key_2"))
    found = await search.page("a", ["a"], query(("person", "per_1")))
    assert [one.created_at for one in found.records] == [2, 1]
    assert not (await search.page("a", ["a"], query(("person", "per_1"), ("key", "key_2")))).records


@pytest.mark.parametrize("order", ["desc", "asc"])
async def test_a_batchs_jobs_are_found_by_the_batch_alone(order: str) -> None:
    batch = f"batch_{1 << 90 | 0x7 << 76 | 2 << 62:032x}"
    ids = [job_id(batch, number) for number in range(1, 8)]
    search = await filled(*(record(1, job=one, batch=batch) for one in ids), record(2))
    assert [one.created_at for one in (await search.page("a", ["a"], query())).records] == [2]
    seen, after = [], ""
    while True:
        wanted = query(("order", order), ("batch", batch), *([("after", after)] if after else []), limit=3)
        page = await search.page("a", ["a"], wanted, lambda newest: line_jobs(batch, newest))
        seen += [one.job for one in page.records]
        if not (after := page.after):
            break
    assert seen == (ids if order == "asc" else ids[::-1])


async def test_exports_hold_every_job_and_no_formula() -> None:
    lure: dict[str, Any] = {"metadata": {"x": "1"}, "public_model": "=cmd()"}
    search = await filled(*(record(number, **lure) for number in range(1, 1203)))
    wanted = query(("fields", "id,model,metadata,error"), limit=1_000_000)
    table = b"".join([piece async for piece in csv_table(search.pages("a", ["a"], wanted), job_object, wanted.fields)])
    head, *rows = csv.reader(io.StringIO(table.decode()))
    assert head == ["id", "model", "metadata", "error"]
    assert rows[-1] == [f"job_{1:032x}", "'=cmd()", '{"x":"1"}', ""]
    assert len({row[0] for row in rows}) == 1202
    lines = b"".join([piece async for piece in json_lines(search.pages("a", ["a"], wanted), job_object, wanted.fields)])
    assert orjson.loads(lines.splitlines()[0]) == {
        "id": f"job_{1202:032x}", "model": "=cmd()", "metadata": {"x": "1"}, "error": None,
    }  # fmt: skip


def test_every_field_of_a_job_can_be_chosen() -> None:
    full = record(
        1,
        batch="b",
        adapted=["x"],
        webhook_state={"url": "u"},
        traceparent=f"00-{1:032x}-{1:016x}-01",
        history=[{"run": 1, "number": 1, "worker": "w", "started_ms": 1}],
    )
    assert set(job_object(full)) == set(JOB_FIELDS)


@pytest.mark.parametrize(
    "body",
    [{}, {"ids": [f"job_{1:032x}"], "filter": {}}, {"filter": {"limit": "3"}}],
)
def test_many_jobs_are_named_in_one_way(body) -> None:
    with pytest.raises(InvalidRequest):
        BulkRequest.model_validate(body).parameters()


def test_operators_name_the_team_of_ids() -> None:
    ids = [f"job_{1:032x}"]
    TeamBulkRequest(ids=ids, team="a").parameters()
    for body in ({"ids": ids}, {"filter": {}, "team": "a"}):
        with pytest.raises(InvalidRequest):
            TeamBulkRequest.model_validate(body).parameters()


async def test_dead_letters_are_grouped_and_a_group_is_replayed(rig: Rig) -> None:
    """Each job is changed on its own: the failure of one is told, and stops no other."""
    await rig.worker()
    jobs = [await rig.submit(echo={"fail": "before"}) for _ in range(3)]
    for job in jobs:
        await rig.ended(job)
    [group] = (await group_letters(rig.jobs))["data"]
    assert (group["count"], group["teams"], group["newest_id"]) == (3, 1, jobs[-1])
    wanted = GroupRequest(error=group["error"], model=group["model"], limit=2)
    letters, before = await find_letters(rig.jobs, wanted)
    assert ([letter.outcome.job for letter in letters], before is None) == (jobs[:0:-1], False)
    await rig.jobs.replay(jobs[1])
    result = await change_all(letters, lambda letter: letter.outcome.job, rig.jobs.replay_letter)
    assert (result.succeeded, [error["id"] for error in result.errors]) == (1, [jobs[1]])
    rest, none = await find_letters(rig.jobs, wanted.model_copy(update={"before": before}))
    assert ([letter.outcome.job for letter in rest], none) == ([jobs[0]], None)
    await rig.jobs.delete_letter(rest[0])
    for job in jobs:
        await rig.ended(job)
    status = await asyncio.gather(*(rig.status(job) for job in jobs))
    assert set(status) == {JobStatus.FAILED}
    assert (await rig.jobs.get(OWNER, jobs[2])).run == 2
