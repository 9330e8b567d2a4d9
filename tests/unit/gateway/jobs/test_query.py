"""Queries for jobs: what they mean, and what they refuse."""

from __future__ import annotations

import pytest

from backbone.ids import new_job_id
from gateway.jobs.query import parse_job_query
from gateway.jobs.records import id_created_at
from schemas.errors import InvalidRequest
from schemas.job_fields import JOB_FIELDS
from schemas.jobs import JobRecord

DAY_S = 86_400
REQUEST = "req_" + "0" * 24


def parse(*pairs: tuple[str, str], for_operator: bool = False):
    return parse_job_query(pairs, fields=JOB_FIELDS, for_operator=for_operator, id_slack_s=DAY_S)


def record(**fields) -> JobRecord:
    job = new_job_id()
    defaults = {"job": job, "owner": "a", "endpoint": "/v1/chat/completions", "model": "m", "public_model": "gpt"}
    return JobRecord.model_validate(defaults | {"created_at": id_created_at(job)} | fields)


@pytest.mark.parametrize(
    ("pairs", "fits", "does_not"),
    [
        ([("status", "failed"), ("status", "expired")], {"status": "expired"}, {"status": "completed"}),
        ([("model", "gpt")], {}, {"public_model": "other"}),
        ([("model", "")], {}, None),
        ([("service_tier", "flex"), ("capability", "chat")], {"lane": "flex"}, {"capability": "speech", "lane": "flex"}),
        ([("error", "timeout")], {"error": {"code": "timeout"}}, {"error": {"code": "other", "type": "timeout"}}),
        ([("error", "backend_error")], {"error": {"type": "backend_error", "code": None}}, {}),
        ([("metadata[a b]", 'x"\u00fc\n')], {"metadata": {"a b": 'x"\u00fc\n'}}, {"metadata": {"a b": "x"}}),
        ([("min_duration", "2.5")], {"started_at": 10, "finished_at": 13}, {"started_at": 10, "finished_at": 12}),
        ([("max_duration", "2")], {"started_at": 10, "finished_at": 12}, {"started_at": 10}),
        ([("created_from", "2020-01-01"), ("created_to", "2100-01-01")], {}, None),
        ([("created_to", "2020-01-01")], None, {}),
        ([("finished_from", "1000"), ("finished_to", "1001")], None, {"finished_at": 1001}),
        ([("request_id", REQUEST), ("worker", "w")], {"request_id": REQUEST, "worker": "w"}, {"worker": "w"}),
        ([("id", "job_0")], {}, None),
        ([("id", "job_f")], None, {}),
    ],
)  # fmt: skip
def test_a_filter_decides_alone_and_by_the_text_of_a_record(pairs, fits, does_not) -> None:
    """What a store looks for in a record's JSON is there whenever the filter fits."""
    conditions = parse(*pairs).conditions
    if fits is not None:
        job = record(**fits)
        assert conditions.matches(job)
        assert all(any(text in job.encode() for text in texts) for texts in conditions.texts())
    if does_not is not None:
        assert not conditions.matches(record(**does_not))


def test_the_ids_that_a_time_allows_leave_room_for_ids_that_are_older_than_their_jobs() -> None:
    """An id may have been claimed a day before its job was stored."""
    job = record()
    late = job.model_copy(update={"created_at": job.created_at + DAY_S})
    conditions = parse(("created_from", str(late.created_at))).conditions
    assert conditions.matches(late)
    assert not conditions.matches(job)


@pytest.mark.parametrize(
    "pair",
    [
        ("status", "sleeping"), ("capability", "x"), ("limit", "0"), ("limit", "101"), ("order", "up"), ("fields", "id,secret"),
        ("created_from", "soon"), ("min_duration", "-1"), ("max_duration", "1e3"), ("id", "job_x"), ("after", "job_0"),
        ("metadata", "a"), ("metadata[]", "a"), ("team", "b"), ("unknown", "1"), ("batch\0", "x"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(pair: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse(pair)
    assert error.value.info.param == pair[0]


def test_operators_name_teams_and_no_metadata() -> None:
    assert parse(("team", "a"), ("team", "b"), for_operator=True).teams == ("a", "b")
    with pytest.raises(InvalidRequest):
        parse(("metadata[a]", "b"), for_operator=True)


def test_ranges_must_not_be_empty() -> None:
    for pairs in (
        (("created_from", "2"), ("created_to", "2")),
        (("min_duration", "3"), ("max_duration", "2")),
    ):
        with pytest.raises(InvalidRequest):
            parse(*pairs)
