"""The harness that watches jobs while their parts are killed sees what must not be."""

from __future__ import annotations

import json
import random

import pytest

from tests.soak.faults import DEEDS, STEPS, draw_faults
from tests.soak.view import Frames, View
from tests.soak.wanted import Cancel, Trouble, Way, draw

Event = tuple[str, str]
WHOLE = [
    ("queued", "1-0-0"),
    ("started", "1-1-0"),
    ("chunk", "1-1-1"),
    ("restarted", "1-2-0"),
    ("chunk", "1-2-1"),
    ("chunk", "1-2-2"),
    ("completed", "1-2-3"),
]


def seen(events: list[Event]) -> View:
    view = View()
    for kind, event_id in events:
        view.take(f"job.{kind}", event_id, json.dumps({"id": event_id}))
    return view


def test_what_is_as_promised_is_no_fault() -> None:
    """Two attempts, of which the second one counts."""
    view = seen(WHOLE)
    assert view.faults == []
    assert (view.end, view.starts, view.last) == ("job.completed", 2, "1-2-3")
    assert [json.loads(chunk)["id"] for chunk in view.chunks] == ["1-2-1", "1-2-2"]


def test_a_later_run_begins_anew() -> None:
    """A retry is queued, and its first attempt is a restart."""
    failed = [*WHOLE[:3], ("failed", "1-1-2")]
    view = View()
    for kind, event_id in [
        *failed[:3],
        ("queued", "2-0-0"),
        ("restarted", "2-1-0"),
        ("chunk", "2-1-1"),
        ("completed", "2-1-2"),
    ]:
        view.take(f"job.{kind}", event_id, "{}")
    assert view.faults == []
    assert view.starts == 1


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([*WHOLE[:5], *WHOLE[6:]], id="a chunk that is missing before the end"),
        pytest.param([*WHOLE[:4], *WHOLE[5:]], id="a chunk that is missing in the middle"),
        pytest.param([*WHOLE[:5], *WHOLE[4:]], id="a chunk that comes twice"),
        pytest.param([*WHOLE[:3], *WHOLE[4:]], id="chunks of two attempts without a restart"),
        pytest.param([*WHOLE[:4], ("chunk", "1-1-2"), *WHOLE[4:]], id="a chunk of the old attempt"),
        pytest.param([*WHOLE, WHOLE[-1]], id="two ends"),
        pytest.param([*WHOLE, ("chunk", "1-2-4")], id="something behind the end"),
        pytest.param([*WHOLE[:2], *WHOLE[:2], *WHOLE[2:]], id="two beginnings"),
        pytest.param([WHOLE[0], *WHOLE[2:]], id="a chunk before any start"),
        pytest.param([*WHOLE[:1], ("restarted", "1-1-0"), ("completed", "1-1-1")], id="a restart of nothing"),
        pytest.param([*WHOLE[:3], ("odd", "1-1-2")], id="an unknown event"),
    ],
)
def test_what_must_not_be_is_a_fault(events: list[Event]) -> None:
    """Each of these is seen."""
    assert seen(events).faults != []


def test_events_are_read_from_their_lines() -> None:
    """Comments and blank lines are none; several lines of data are one."""
    frames = Frames()
    lines = [": keep-alive", "", "event: job.chunk", "id: 1-1-1", "data: a", "data: b", "", "data: [DONE]", ""]
    assert [told for line in lines if (told := frames.line(line))] == [
        ("job.chunk", "1-1-1", "a\nb"),
        ("", "", "[DONE]"),
    ]


def test_a_round_has_something_of_everything() -> None:
    """Whatever the seed: streams, cancelled jobs, failures; and over some seeds each way, each part, each deed, each step."""
    ways, faults = set[Way](), []
    for seed in range(60):
        rng = random.Random(str(seed))
        faults += draw_faults(rng)
        jobs = [draw(rng, f"{seed}.{number}", number) for number in range(24)]
        assert sum(job.streamed for job in jobs) >= 8
        assert {job.cancel for job in jobs} == set(Cancel)
        assert {job.trouble for job in jobs} == set(Trouble)
        ways |= {job.way for job in jobs}
    assert ways == set(Way)
    assert {(fault.part, fault.deed) for fault in faults} == {(part, deed) for part in DEEDS for deed in DEEDS[part]}
    assert {fault.step for fault in faults} == set(STEPS)


def test_another_jobs_answer_is_not_whole() -> None:
    """A cut answer, and one of another job, are told from the right one."""
    rng = random.Random("answers")
    wanted = draw(rng, "a", 1)
    text = wanted.body["messages"][0]["content"]

    def answer(content: str, job: str = "job_1") -> bytes:
        message = {"message": {"role": "assistant", "content": content}}
        return json.dumps({"id": f"chatcmpl-{job}", "choices": [message]}).encode()

    assert wanted.whole("job_1", answer(text))
    assert not wanted.whole("job_1", answer(text[:-1]))
    assert not wanted.whole("job_1", answer(text, "job_2"))
