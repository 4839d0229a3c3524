"""A limit is what was accepted between two moments at which the server's bucket was empty, ÷ the time between them."""

import pytest

from batchrun.limits.measured_rate import BURST_OFF, FIRM_TIMES, LEAST_TIMES, MOMENT_S, MeasuredRate


def accepted(rate: MeasuredRate, from_s: float, to_s: float, per_s: float, amount: float = 1.0) -> None:
    """Evenly, `to_s` excluded."""
    for at in range(round((to_s - from_s) * per_s)):
        rate.count(from_s + at / per_s, amount, refused=False)


@pytest.fixture
def rate() -> MeasuredRate:
    return MeasuredRate()


def test_the_rate_is_accepted_by_time_since_empty(rate: MeasuredRate) -> None:
    accepted(rate, 0.0, 2.0, 100.0)
    assert rate.per_s(2.0) is None, "nothing shows when the bucket was empty"
    rate.count(2.0, 1.0, refused=True)
    rate.mark(2.0)
    accepted(rate, 2.0, 5.0, 20.0)
    assert rate.taken == 60
    assert rate.delivered.total == 260
    assert rate.per_s(5.0) == pytest.approx(20.0)


def test_a_second_or_ten_requests_are_needed(rate: MeasuredRate) -> None:
    rate.mark(0.0)
    accepted(rate, 0.0, 0.9, 100.0)
    assert rate.per_s(0.9) is None
    slow = MeasuredRate()
    slow.mark(0.0)
    accepted(slow, 0.0, (LEAST_TIMES - 1) / 2, 2.0)
    assert slow.per_s(4.5) is None
    accepted(slow, 4.5, 5.0, 2.0)
    assert slow.per_s(5.0) == pytest.approx(2.0)


def test_a_rate_is_firm_after_twenty_requests(rate: MeasuredRate) -> None:
    rate.count(0.0, 3.0, refused=True)  # of three tokens each
    rate.mark(0.0)
    accepted(rate, 0.0, FIRM_TIMES - 1.0, 1.0, amount=3.0)
    assert not rate.is_firm
    accepted(rate, FIRM_TIMES - 1.0, FIRM_TIMES, 1.0, amount=3.0)
    assert rate.is_firm


def test_a_new_mark_begins_at_nothing(rate: MeasuredRate) -> None:
    rate.count(0.0, 1.0, refused=False)
    rate.count(0.0, 1.0, refused=True)
    assert (rate.share, rate.refused_above(0.25)) == (0.5, 0.5)
    rate.mark(1.0)
    assert (rate.is_marked, rate.counted, rate.refused, rate.taken, rate.share) == (True, 0, 0, 0.0, 0.0)
    rate.unmark()
    assert (rate.is_marked, rate.taken) == (False, 1.0)


def test_an_answer_larger_than_estimated_counts_so(rate: MeasuredRate) -> None:
    rate.mark(0.0)
    accepted(rate, 0.0, 2.0, 10.0, amount=100.0)
    rate.correct(400.0)
    assert rate.taken == 2_400
    assert rate.per_s(2.0) == pytest.approx(1_200.0)


def test_a_bucket_holds_what_its_first_moment_accepted(rate: MeasuredRate) -> None:
    """A refusal between requests that were sent at once leaves it open how much that is."""
    for refused in (False, False, True, False):
        rate.count(10.0, 1.0, refused=refused)
    assert (rate.at_first, rate.is_mixed) == (3.0, True)
    rate.count(10.0 + 2 * MOMENT_S, 1.0, refused=False)
    assert rate.at_first == 3.0


def test_later_acceptance_is_no_mixed_moment(rate: MeasuredRate) -> None:
    rate.count(10.0, 1.0, refused=False)
    rate.count(10.0 + 2 * MOMENT_S, 1.0, refused=True)
    rate.count(10.0 + 3 * MOMENT_S, 1.0, refused=False)
    assert (rate.at_first, rate.is_mixed) == (1.0, False)


def test_ten_good_seconds_are_a_lower_bound(rate: MeasuredRate) -> None:
    """The bucket was empty long ago, and hardly anything was sent until lately."""
    rate.mark(0.0)
    accepted(rate, 0.0, 1.0, 1.0)
    assert rate.at_least(5.0) == 0.0
    accepted(rate, 90.0, 100.0, 50.0)
    assert rate.at_least(100.0) == pytest.approx(BURST_OFF * 50.0, rel=0.01)
    assert rate.per_s(100.0) == pytest.approx(BURST_OFF * 50.0, rel=0.01)


def test_the_servers_bucket_fills_at_the_limit(rate: MeasuredRate) -> None:
    """It is full at what it gave before the first refusal, less what was refilled meanwhile."""
    accepted(rate, 0.0, 1.0, 30.0)
    rate.mark(1.0)
    assert rate.server_level(1.0, 10.0) == pytest.approx(0.0)
    accepted(rate, 1.0, 2.0, 4.0)
    assert rate.server_level(2.0, 10.0) == pytest.approx(6.0)
    assert rate.server_level(60.0, 10.0) == pytest.approx(20.0)
    rate.mark(61.0)
    assert rate.server_level(200.0, 10.0) == pytest.approx(20.0), "the first burst shows it, not a later one"
    assert rate.server_level(200.0, None) == 0.0
    rate.unmark()
    assert rate.server_level(200.0, 10.0) == 0.0
    rate.mark(201.0)
    assert rate.server_level(300.0, 10.0) == pytest.approx(20.0)
