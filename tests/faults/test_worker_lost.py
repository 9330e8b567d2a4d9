"""Workers that die or freeze in the middle of their work."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import Cluster, Crew, Recorded
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACK_WAIT_S = 2.0
SLACK_S = 15.0
"""What a busy machine with two cores may add to a bound of the contract."""
OLD = "tokens=40,size=400"
"""The first worker's tokens are 10 letters long …"""
NEW = "tokens=40,size=800"
"""… and the second's 20: an answer shows who gave it, and whether two were mixed."""


def whole(answer: Recorded, size: int) -> bool:
    """One worker's whole answer, and nothing of another's."""
    if answer.status != 200 or answer.broken:
        return False
    if answer.lines:
        return answer.complete and answer.texts == ["x" * size] * 40
    return answer.text == "x" * size * 40


async def test_killed_before_the_first_token(crew: Crew, eventually: Eventually) -> None:
    """A worker is killed before its first tokens: everybody who waits sees the same short delay, and then the whole answer."""
    old = await crew.start(options=f"{OLD},first_delay_ms=60000", WORKER_CONCURRENCY="16")
    answers = [crew.ask(stream=bool(number % 2)) for number in range(16)]
    await eventually(lambda: crew.runs(16))
    await crew.start(options=NEW)
    killed_at = asyncio.get_running_loop().time()
    crew.kill(old)
    await asyncio.gather(*(answer.end() for answer in answers))
    assert [whole(answer, 20) for answer in answers] == [True] * 16
    assert asyncio.get_running_loop().time() - killed_at < ACK_WAIT_S + 1 + SLACK_S
    await eventually(lambda: crew.idle())


async def test_killed_after_the_first_token(crew: Crew, eventually: Eventually) -> None:
    """A worker is killed halfway: a stream ends in an error and is never taken for complete; another answer is only late."""
    old = await crew.start(options=f"{OLD},first_delay_ms=0,delay_ms=1000")
    stream, answer = crew.stream(), crew.ask()
    await eventually(lambda: crew.runs(2))
    await crew.start(options=NEW)
    await eventually(lambda: len(stream.texts) >= 2)
    crew.kill(old)
    await asyncio.gather(stream.end(), answer.end())
    assert whole(answer, 20)
    assert not stream.complete
    assert "[DONE]" not in stream.lines
    assert stream.error is not None
    assert stream.error["code"] == "worker_lost"
    assert set(stream.texts) == {"x" * 10}
    await eventually(lambda: crew.idle())


async def test_killed_in_the_middle_of_a_stream_with_nobody_else(crew: Crew, eventually: Eventually) -> None:
    """The only worker is killed in the middle of a stream: the stream still ends, in an error."""
    only = await crew.start(options=f"{OLD},first_delay_ms=0,delay_ms=1000")
    stream = crew.stream()
    await eventually(lambda: stream.texts)
    crew.kill(only)
    killed_at = asyncio.get_running_loop().time()
    await stream.end()
    assert stream.error is not None
    assert stream.error["code"] == "worker_lost"
    assert not stream.complete
    assert asyncio.get_running_loop().time() - killed_at < 2 * ACK_WAIT_S + SLACK_S
    await eventually(lambda: crew.idle(), what="the job has left the queue")


async def test_frozen_before_the_first_token(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A worker freezes before its first token, another one answers, and the thawed one says nothing any more."""
    old = await crew.start(options=f"{OLD},first_delay_ms=3000")
    answers = [crew.stream(), crew.ask()]
    await eventually(lambda: crew.runs(2))
    crew.freeze(old)
    new = await crew.start(options=NEW)
    await asyncio.gather(*(answer.end() for answer in answers))
    crew.thaw(old)
    assert [whole(answer, 20) for answer in answers] == [True, True]
    await eventually(lambda: len(cluster.attempts(old)) == 2)
    assert [attempt["outcome"] for attempt in cluster.attempts(old)] == ["fenced", "fenced"]
    await eventually(lambda: len(cluster.attempts(new)) == 2)
    assert [attempt["outcome"] for attempt in cluster.attempts(new)] == ["completed", "completed"]
    await eventually(lambda: crew.idle())


async def test_frozen_alone(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """The only worker freezes for longer than `ack_wait`, and then gives exactly one answer to each request."""
    only = await crew.start(options=f"{OLD},first_delay_ms=1500,delay_ms=10")
    answers = [crew.stream(), crew.ask(), crew.ask()]
    await eventually(lambda: crew.runs(3))
    crew.freeze(only)
    await asyncio.sleep(ACK_WAIT_S + 1.5)  # the freeze is the fault; there is nothing to wait for
    crew.thaw(only)
    await asyncio.gather(*(answer.end() for answer in answers))
    assert [whole(answer, 10) for answer in answers] == [True, True, True]
    await eventually(lambda: crew.idle())
    await eventually(lambda: len(cluster.attempts(only)) == 6)
    outcomes = sorted(attempt["outcome"] for attempt in cluster.attempts(only))
    assert outcomes == ["completed"] * 3 + ["fenced"] * 3


async def test_frozen_in_the_middle_of_a_stream(crew: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A worker freezes in the middle of its answers: the stream ends in an error, the other is answered whole by one worker."""
    old = await crew.start(options=f"{OLD},first_delay_ms=0,delay_ms=250")
    stream, answer = crew.stream(), crew.ask()
    await eventually(lambda: crew.runs(2))
    await eventually(lambda: len(stream.texts) >= 2)
    crew.freeze(old)
    await crew.start(options=NEW)
    await asyncio.gather(stream.end(), answer.end())
    crew.thaw(old)
    assert stream.error is not None
    assert "[DONE]" not in stream.lines
    assert set(stream.texts) == {"x" * 10}
    assert whole(answer, 20)
    await eventually(lambda: len(cluster.attempts(old)) == 2)
    assert {attempt["outcome"] for attempt in cluster.attempts(old)} <= {"fenced", "cancelled"}
    await eventually(lambda: crew.idle())


async def test_a_request_that_kills_its_workers(crew: Crew, eventually: Eventually) -> None:
    """A request whose workers die each time is given up after three of them, with a clear error, and leaves the queue."""
    answer = None
    for _ in range(3):
        name = await crew.start(options="fail=hang")
        answer = answer or crew.ask()
        await eventually(lambda: crew.runs(1))
        await eventually(lambda name=name: crew.busy(name))
        crew.kill(name)
    assert answer is not None
    await crew.start(options=NEW)
    await answer.end()
    assert answer.status == 502
    assert answer.error is not None
    assert answer.error["code"] == "worker_lost"
    assert "3 times" in answer.error["message"]
    await eventually(lambda: crew.idle())
    assert whole(await crew.ask().end(), 20), "the next request is served"
