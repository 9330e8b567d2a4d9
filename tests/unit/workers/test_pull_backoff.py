"""Of many idle workers a few answer the bell, whatever their number; one that is left alone answers it again."""

from __future__ import annotations

import random

import pytest

from backbone.bus.bus import Queue
from schemas.jobs import Capability, Lane
from workers.pull_backoff import LATE_S, LEAST, PullBackoff

QUEUE = Queue(Capability.CHAT, Lane.DEFAULT, "a")
OTHER = QUEUE._replace(model="b")


def rings(herds: list[PullBackoff], count: int) -> tuple[float, float]:
    """So many jobs, one after the other. Returns how many workers asked for each, and which share of them nobody asked for."""
    asked = nobody = 0
    for _ in range(count):
        answer = [herd for herd in herds if herd.answers(QUEUE)]
        asked += len(answer)
        nobody += not answer
        quickest = random.choice(answer or herds)  # a job that nobody asks for is found by a slow round
        quickest.found(QUEUE)
        for herd in herds:
            if herd is not quickest:
                # Those who asked hear at once that nothing is there, the others in their next round.
                herd.missed(QUEUE)
    return asked / count, nobody / count


@pytest.mark.parametrize("workers", [2, 3, 6, 20, 300])
def test_a_few_ask_however_many_there_are(workers: int) -> None:
    herds = [PullBackoff() for _ in range(workers)]
    rings(herds, 500)
    asked, nobody = rings(herds, 300)
    assert 1.9 < asked < max(12, 2 * LEAST * workers)
    assert nobody < 0.05


def test_the_last_one_left_soon_answers_every_bell() -> None:
    herds = [PullBackoff() for _ in range(500)]
    rings(herds, 200)
    left = herds[:1]
    rings(left, 30)
    assert rings(left, 50) == (1, 0)


def test_who_always_comes_second_soon_leaves_jobs_to_the_first_but_not_for_long() -> None:
    first, second = PullBackoff(), PullBackoff()
    for _ in range(200):
        first.answers(QUEUE)
        first.found(QUEUE)
        second.answers(QUEUE)
        second.missed(QUEUE)
    assert sum(second.answers(QUEUE) for _ in range(100)) < 30
    assert second.patience_s(QUEUE) == LATE_S / LEAST
    while second.answers(QUEUE):
        second.missed(QUEUE)
    second.found(QUEUE)  # the first one was busy
    assert all(second.answers(QUEUE) for _ in range(10))


def test_a_queue_of_this_worker_alone_is_answered_whatever_others_are_like() -> None:
    herds = [PullBackoff() for _ in range(100)]
    rings(herds, 200)
    assert all(herd.answers(OTHER) for herd in herds)
