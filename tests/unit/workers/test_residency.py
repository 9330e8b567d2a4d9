"""Learning a server's memory, and the turns of its models."""

from __future__ import annotations

import pytest

from workers.model_turns import HIGHER_LANE_PATIENCE_S, ModelTurns
from workers.queue_selector import AGING_S
from workers.residency import MAX_SETS, Residency

A, B, C = "a", "b", "c"


def models(*names: str) -> frozenset[str]:
    return frozenset(names)


class TestResidency:
    def test_nothing_is_known_at_first(self) -> None:
        fresh = Residency()
        assert fresh.fits(models()) is True
        assert fresh.fits(models(A)) is True
        assert fresh.fits(models(A, B)) is None

    def test_sets_that_were_seen(self) -> None:
        seen = Residency()
        seen.record_fitting(models(A, B))
        seen.record_conflict(models(A, B, C))
        assert seen.fits(models(A, B)) is True
        assert seen.fits(models(A, B, C)) is False

    def test_sets_that_were_not_tried_are_judged_by_their_size(self) -> None:
        seen = Residency()
        seen.record_conflict(models(A, B))
        assert seen.fits(models(B, C)) is False
        seen.record_fitting(models(A, C))
        assert seen.fits(models(B, C)) is True
        assert seen.fits(models(A, B)) is False, "one that was tried is not"

    def test_what_was_seen_last_counts(self) -> None:
        seen = Residency()
        seen.record_conflict(models(A, B))
        seen.record_fitting(models(A, B))
        assert seen.fits(models(A, B)) is True
        seen.record_conflict(models(A, B))
        assert seen.fits(models(A, B)) is False

    def test_it_remembers_a_bounded_number(self) -> None:
        seen = Residency()
        for number in range(3 * MAX_SETS):
            seen.record_conflict(models(A, str(number)))
            seen.record_fitting(models(B, str(number)))
        assert max(len(seen._conflicting), len(seen._fitting)) <= MAX_SETS


def turns(*, apart: bool | None = True) -> ModelTurns:
    """Return the turns of a server with two models, of which A is loaded."""
    made = ModelTurns(10.0)
    made.update_models(models(A, B), models(A))
    if apart is not None:
        load(made, B, 1.0, models(B) if apart else models(A, B))
        if apart:
            load(made, A, 2.0, models(A))
    return made


def load(made: ModelTurns, model: str, at: float, after: frozenset[str]) -> None:
    """Run a job that loads the model within half a second, and ends."""
    made.record_request(model)
    made.start_job(model, at)
    made.update_residency(after, {model}, at + 0.5)
    made.record_end(model)


class TestTurns:
    def test_a_model_beside_the_one_in_use_waits(self) -> None:
        made = turns()
        made.record_request(A)
        assert made.admits(A, {A, B})
        assert not made.admits(B, {A, B})
        made.record_end(A)
        assert not made.admits(B, {A, B}), "the group goes on while jobs of it wait"
        assert made.admits(B, {B})

    def test_models_that_fit_do_not_wait(self) -> None:
        made = turns(apart=False)
        assert made.unrestricted
        made.record_request(A)
        assert made.admits(B, {A, B})

    def test_a_first_try_holds_the_others_until_it_shows(self) -> None:
        made = turns(apart=None)
        made.record_request(A)
        assert made.admits(B, {A, B})
        made.record_request(B)
        made.start_job(B, 1.0)
        assert not made.admits(A, {A, B})
        made.update_residency(models(A), (), 1.1)
        assert not made.admits(A, {A, B})
        made.update_residency(models(A, B), (), 1.2)  # B is being loaded, and A is still there
        assert made.admits(A, {A, B})
        made.update_residency(models(A, B), {B}, 2.0)
        assert made.unrestricted

    def test_only_one_more_model_is_tried_at_a_time(self) -> None:
        made = ModelTurns(10.0)
        made.update_models(models(A, B, C), models())
        made.record_request(A)
        made.start_job(A, 0.0)
        assert not made.admits(B, {B, C})
        made.update_residency(models(A), {A}, 1.0)
        assert made.admits(B, {B, C})

    def test_jobs_that_got_in_each_others_way_end_first(self) -> None:
        """Jobs of both models run although these do not fit together: neither model gets more."""
        made = turns()
        made.record_request(A)
        made.record_request(B)
        assert not made.admits(A, {A, B})
        assert not made.admits(B, {A, B})
        made.record_end(A)
        assert made.admits(B, {A, B})

    def test_a_claim_makes_the_others_give_way(self) -> None:
        made = turns()
        made.record_request(A)
        made.claim(B, {A, B})
        assert not made.admits(A, {A, B})
        assert not made.admits(B, {A, B})
        made.record_end(A)
        assert made.admits(B, {A, B})
        assert not made.admits(A, {A, B})
        made.record_request(B)
        made.start_job(B, 20.0)
        assert made.claimant is None
        assert not made.admits(A, {A, B}), "it is B's turn now"

    def test_a_claim_for_nothing_is_withdrawn(self) -> None:
        made = turns()
        made.claim(B, {A, B})
        made.cancel_claim(B)
        assert made.admits(A, {A, B})

    def test_as_few_as_possible_give_way(self) -> None:
        """Two of three models fit: the one with the oldest turn yields."""
        made = ModelTurns(10.0)
        made.update_models(models(A, B, C), models(A, B))
        load(made, C, 1.0, models(B, C))
        load(made, A, 3.0, models(A, C))
        for model in (A, C):
            made.record_request(model)
        made.claim(B, {A, B, C})
        assert made.admits(A, {A, B, C})
        assert not made.admits(C, {A, B, C})
        made.record_end(C)
        assert made.admits(B, {A, B, C})

    def test_a_turn_lasts_as_long_as_its_load_took(self) -> None:
        made = turns()
        made.record_request(A)
        assert not made.may_claim(B, {A, B}, 2.9)  # loaded from 2.0 to 2.5
        assert made.may_claim(B, {A, B}, 3.0)

    def test_how_long_a_job_waits(self) -> None:
        made = turns()
        assert [made.patience_s(standing) for standing in (-1, 0, 1)] == [HIGHER_LANE_PATIENCE_S, 10.0, AGING_S]

    def test_models_that_the_server_does_not_load_are_no_matter(self) -> None:
        """A remote model and the queue for model jobs are always admitted."""
        made = turns()
        made.record_request(A)
        made.record_request("remote")
        made.start_job("remote", 5.0)
        assert made.admits("remote", {A, B})
        assert made.loading_models == {}.keys()

    def test_a_load_that_fails_teaches_nothing(self) -> None:
        made = turns(apart=None)
        made.record_request(A)
        made.record_request(B)
        made.start_job(B, 1.0)
        made.update_residency(models(A), {B}, 2.0)
        assert made.admits(A, {A})
        made.record_end(B)
        assert made.admits(B, {B})

    def test_a_load_that_nobody_could_watch_teaches_nothing(self) -> None:
        """The server does not report its models; the load ends all the same."""
        made = turns(apart=None)
        made.record_request(B)
        made.start_job(B, 1.0)
        assert not made.update_residency(None, (), 1.5)
        assert not made.admits(A, {A}), "B is still on trial"
        assert made.update_residency(None, {B}, 2.0)
        assert not made.loading_models
        assert made.admits(A, {A})
        made.update_models(models(A, B), models(B))
        assert made._fits(models(A, B)) is None

    def test_a_claim_of_a_model_that_is_removed_ends(self) -> None:
        made = turns()
        made.update_models(models(A, B, C), models(A))
        made.record_request(A)
        made.claim(B, {A, B})
        made.record_end(A)
        assert not made.admits(A, {A, B})
        made.update_models(models(A, C), models(A))
        assert made.admits(A, {A})

    def test_jobs_in_hand_of_a_model_that_is_removed_do_not_count(self) -> None:
        """Jobs that were requested of its queue are not discounted later."""
        made = turns()
        made.update_models(models(A, B, C), models(A))
        made.record_request(A)
        made.update_models(models(B, C), models())
        assert made.admits(B, {B})

    def test_a_server_that_says_the_same_twice_has_not_changed(self) -> None:
        made = turns(apart=None)
        made.record_request(B)
        made.start_job(B, 1.0)
        assert made.update_residency(models(B), (), 1.1)
        assert not made.update_residency(models(B), (), 1.2)

    @pytest.mark.parametrize("answer", [models(), models(A)])
    def test_a_server_with_one_model_needs_no_turns(self, answer: frozenset[str]) -> None:
        made = ModelTurns(10.0)
        made.update_models(models(A), answer)
        assert not made.is_needed
        assert made.unrestricted
