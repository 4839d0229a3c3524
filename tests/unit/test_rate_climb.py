"""A learned rate is raised by growing steps, only while it is used, and after a rest if a climb was in vain."""

import pytest

from batchrun.limits import rate_climb
from batchrun.limits.rate_climb import EVERY, EVERY_S, MAX_EVERY_S, MAX_STEP, ROUGH_STEP, STEP, USED, WORTH, RateClimb


def started(*, rough: bool = False, step: float | None = None, steady: bool = False) -> RateClimb:
    climb = RateClimb()
    climb.begin(rough=rough, step=step, steady=steady)
    climb.restart(0.0, 0.0)
    return climb


def test_steps_grow_to_a_third() -> None:
    climb = started()
    steps = [climb.next_step() for _ in range(8)]
    assert steps[:3] == pytest.approx([STEP, 2 * STEP, 4 * STEP])
    assert steps[-2:] == [MAX_STEP, MAX_STEP]


def test_rough_steps_are_larger_and_grow_slower() -> None:
    climb = started(rough=True)
    assert [climb.next_step() for _ in range(3)] == pytest.approx([ROUGH_STEP, 1.5 * ROUGH_STEP, 2.25 * ROUGH_STEP])


def test_steady_steps_stay_as_they_are() -> None:
    climb = started(step=0.04, steady=True)
    assert [climb.next_step() for _ in range(3)] == [0.04] * 3


def test_a_doubled_rate_doubles_again() -> None:
    climb = started(rough=True, step=rate_climb.DOUBLED)
    assert [climb.next_step() for _ in range(3)] == [1.0] * 3


@pytest.mark.parametrize(
    ("per_s", "every_s"), [(100.0, EVERY_S), (EVERY / 5, 5.0), (0.5, MAX_EVERY_S)], ids=["fast", "by requests", "slow"]
)
def test_a_step_comes_after_seconds_or_requests(per_s: float, every_s: float) -> None:
    assert not started().is_due(every_s - 0.01, every_s * per_s, per_s, per_s)
    assert started().is_due(every_s, every_s * per_s, per_s, per_s)


def test_a_rate_not_used_is_not_raised() -> None:
    assert started().is_due(EVERY_S, USED * EVERY_S * 100, 100.0, 100.0)
    assert not started().is_due(EVERY_S, USED * EVERY_S * 100 - 1, 100.0, 100.0)


def test_each_step_is_due_after_the_last() -> None:
    climb = started()
    assert climb.is_due(EVERY_S, 300.0, 100.0, 100.0)
    assert not climb.is_due(EVERY_S + 1, 400.0, 100.0, 100.0)
    assert not climb.is_due(2 * EVERY_S, 400.0, 100.0, 100.0), "of the last three seconds only one was used"


def test_a_climb_in_vain_rests_until_paid_for() -> None:
    """Its refusals are then a small share of all that was sent since it began."""
    climb = started()
    climb.counted_before = 1_000
    climb.rest_after(refused=1.0, counted=1_000 + int(1 / WORTH) - 60)
    assert climb.rests
    climb.is_due(EVERY / 10, EVERY, 10.0, 10.0)
    assert climb.rests
    climb.is_due(2 * EVERY / 10, 2 * EVERY, 10.0, 10.0)
    assert not climb.rests


def test_a_climb_already_paid_for_needs_no_rest() -> None:
    climb = started()
    climb.counted_before = 1_000
    climb.rest_after(refused=1.0, counted=1_000 + int(1 / WORTH))
    assert not climb.rests


def test_a_rest_ends_after_a_hundred_requests() -> None:
    climb = started()
    climb.rest_after(refused=50.0, counted=0)
    for step in range(1, 4):
        assert climb.rests
        climb.is_due(step * MAX_EVERY_S, 40.0 * step, 5.0, 5.0)
    assert not climb.rests


def test_evenly_spaced_requests_rest_for_minutes() -> None:
    climb = started()
    climb.rest_long(refused=50.0, requests_per_s=10.0)
    rested_s = 0.0
    while climb.rests:
        rested_s += EVERY / 10
        climb.is_due(rested_s, rested_s * 10, 10.0, 10.0)
    assert rested_s == pytest.approx(rate_climb.MOST_REST_S, abs=EVERY / 10)
