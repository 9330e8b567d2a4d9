"""Of many idle workers only a few react to a notification; a worker without others reacts to each again."""

from __future__ import annotations

import random

import pytest

from backbone.bus.bus import Queue
from schemas.jobs import Capability, Lane
from workers.pull_backoff import DEFERRAL_S, MIN_PROBABILITY, PullBackoff

QUEUE = Queue(Capability.CHAT, Lane.DEFAULT, "a")
OTHER = QUEUE._replace(model="b")


def rings(backoffs: list[PullBackoff], count: int) -> tuple[float, float]:
    """Store `count` jobs one after the other; return how many workers pulled each, and the share that no worker pulled."""
    asked = nobody = 0
    for _ in range(count):
        answer = [backoff for backoff in backoffs if backoff.should_pull(QUEUE)]
        asked += len(answer)
        nobody += not answer
        quickest = random.choice(answer or backoffs)  # a slow round finds a job that no worker pulled
        quickest.record_job(QUEUE)
        for backoff in backoffs:
            if backoff is not quickest:
                # Workers that pulled find the queue empty at once, the others in their next round.
                backoff.record_empty(QUEUE)
    return asked / count, nobody / count


@pytest.mark.parametrize("workers", [2, 3, 6, 20, 300])
def test_a_few_ask_however_many_there_are(workers: int) -> None:
    backoffs = [PullBackoff() for _ in range(workers)]
    rings(backoffs, 500)
    asked, nobody = rings(backoffs, 300)
    assert 1.9 < asked < max(12, 2 * MIN_PROBABILITY * workers)
    assert nobody < 0.05


def test_the_last_one_left_soon_answers_every_bell() -> None:
    backoffs = [PullBackoff() for _ in range(500)]
    rings(backoffs, 200)
    left = backoffs[:1]
    rings(left, 30)
    assert rings(left, 50) == (1, 0)


def test_who_always_comes_second_soon_leaves_jobs_to_the_first_but_not_for_long() -> None:
    first, second = PullBackoff(), PullBackoff()
    for _ in range(2000):  # chance decides how long it takes: some 140 rounds, seldom over 400
        first.should_pull(QUEUE)
        first.record_job(QUEUE)
        second.should_pull(QUEUE)
        second.record_empty(QUEUE)
    assert sum(second.should_pull(QUEUE) for _ in range(100)) < 30
    assert second.deferral_s(QUEUE) == DEFERRAL_S / MIN_PROBABILITY
    while second.should_pull(QUEUE):
        second.record_empty(QUEUE)
    second.record_job(QUEUE)  # the first one was busy
    assert all(second.should_pull(QUEUE) for _ in range(10))


def test_a_queue_of_this_worker_alone_is_answered_whatever_others_are_like() -> None:
    backoffs = [PullBackoff() for _ in range(100)]
    rings(backoffs, 200)
    assert all(backoff.should_pull(OTHER) for backoff in backoffs)
