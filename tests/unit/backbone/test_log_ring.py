"""The newest lines of a process, as a search finds them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from backbone.log_ring import LINE_OVERHEAD_BYTES, LogRing
from schemas.logs import LogAnswer

PROGRAM = """
import logging, os, sys
import structlog
from backbone.logging import answer_log_query, configure_logging, log_info
from schemas.logs import LogQuery, ProcessKind
configure_logging(sys.argv[1], "debug", ring_bytes=10_000)
log = structlog.get_logger("x")
log_info("request.finished", {"request_id": "req_1"})
log.warning("attempt.finished", job="job_1", request_id="req_1")
log.debug("request.prompt", request_id="req_1", body="a secret")
logging.getLogger("library").warning("about req_1")
log_info("request.finished", {"request_id": "req_2"})
def answer(query, name):
    os.write(int(sys.argv[2]), answer_log_query(query, ProcessKind.WORKER, name) + b"\\n\\n")
answer(LogQuery(texts=("req_1",)), "w")
if child := os.fork():
    os.waitpid(child, 0)
else:
    answer(LogQuery(), "child")
    os._exit(0)
"""


def line(number: int, text: str = "") -> bytes:
    return b'{"timestamp":"2026-11-30T15:00:%02dZ","id":"%b"}' % (number, text.encode())


def ring_of(*lines: bytes, max_bytes: int = 10_000) -> LogRing:
    ring = LogRing(max_bytes)
    for one in lines:
        ring.extend([one], len(one))
    return ring


def test_the_newest_lines_stay() -> None:
    """The ring takes no more memory than it may, and says how far it reaches back."""
    size = len(line(0)) + LINE_OVERHEAD_BYTES
    ring = ring_of(*map(line, range(10)), max_bytes=3 * size)
    found = ring.find(limit=100, max_bytes=10_000)
    assert found.lines == [line(7), line(8), line(9)]
    assert (found.last, found.oldest_at, found.is_complete) == (10, "2026-11-30T15:00:07Z", False)


def test_a_line_is_found_by_any_of_the_texts() -> None:
    """Oldest first; the limits leave out older ones, and say so."""
    ring = ring_of(line(0, "req_a"), line(1, "req_b"), line(2, "job_a"), line(3, "req_a"))
    found = ring.find([b"req_a", b"job_a"], limit=10, max_bytes=10_000)
    assert found.lines == [line(0, "req_a"), line(2, "job_a"), line(3, "req_a")]
    assert (found.has_more, found.is_complete) == (False, True)
    by_number = ring.find([b"req_a", b"job_a"], limit=2, max_bytes=10_000)
    by_size = ring.find([b"req_a", b"job_a"], limit=10, max_bytes=2 * len(line(0, "req_a")) + 2)
    assert by_number == by_size
    assert (by_number.lines, by_number.has_more) == ([line(2, "job_a"), line(3, "req_a")], True)


@pytest.mark.parametrize(("after", "numbers"), [(0, [1, 2, 3]), (2, [2, 3]), (4, []), (9, [])])
def test_a_reader_goes_on_where_it_was(after: int, numbers: list[int]) -> None:
    """Lines are counted from 1, also those that were dropped."""
    ring = ring_of(*map(line, range(4)), max_bytes=3 * (len(line(0)) + LINE_OVERHEAD_BYTES))
    found = ring.find(after=after, limit=10, max_bytes=10_000)
    assert (found.lines, found.last) == ([line(number) for number in numbers], 4)


def test_a_ring_without_memory_is_empty() -> None:
    """It counts, and holds nothing."""
    found = ring_of(line(0), max_bytes=0).find(limit=10, max_bytes=10_000)
    assert (found.lines, found.last, found.oldest_at, found.is_complete) == ([], 1, "", False)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_each_line_of_a_process_is_in_its_ring(log_format: str) -> None:
    """Those of libraries too, in both formats, at once; never a prompt. A forked process begins without lines."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format, "2"], capture_output=True, check=True, timeout=60
    ).stderr
    parent, child = (LogAnswer.decode(one) for one in found.rstrip(b"\n").split(b"\n\n"))
    answer, lines = parent
    assert [one["event"] for one in lines] == ["request.finished", "attempt.finished", "about req_1"]
    assert [one["level"] for one in lines] == ["info", "warning", "warning"]
    assert {one["timestamp"][-1] for one in lines} == {"Z"}
    assert (answer.id, answer.last, answer.is_complete, answer.has_more) == ("w", 5, True, False)
    assert answer.oldest_at <= lines[0]["timestamp"]
    assert child[1] == []


def test_what_a_worker_sends_is_checked() -> None:
    """A line that is no object is left out; an answer that is none, or too large, is refused."""
    answer = LogAnswer.model_validate({"id": "w", "kind": "worker", "last": 1, "is_complete": True, "has_more": False})
    lines = [b'{"event":"x"}', b"[1]", b"{", b"\xff", b"[" * 10_000, json.dumps({"n": 1}).encode()]
    assert LogAnswer.decode(answer.encode(lines)) == (answer, [{"event": "x"}, {"n": 1}])
    for message in (
        b"",
        b"{}",
        b'{"id":"a b","kind":"worker","last":1,"is_complete":true,"has_more":false}',
        b" " * 2**20,
    ):
        with pytest.raises(ValueError, match=r".+"):
            LogAnswer.decode(message)
