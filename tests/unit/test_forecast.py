"""The forecast extends the last minutes: when a run ends, how much is done by a deadline, and the warning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.limits.admission import Limit
from batchrun.limits.forecast import LEAK, RATE_S, WINDOW_S, Concern, Forecast, Recent, Sample, peak


def seen(
    rate: float, seconds: int, limit: Limit = Limit.REQUESTS, *, into: Recent | None = None, at_s: float = 0.0
) -> Recent:
    """A run that has settled `rate` rows a second, of ten tokens each, for so long, looked at twice a second."""
    recent = Recent() if into is None else into
    for beat in range(2 * seconds + 1):
        settled = int(rate * (at_s + beat / 2))
        recent.add(Sample(at_s + beat / 2, settled, 10 * settled, limit))
    return recent


def forecast(recent: Recent, rows: int) -> Forecast:
    found = recent.forecast(rows)
    assert found is not None
    return found


def test_a_steady_rate_is_extrapolated() -> None:
    found = forecast(seen(5, 60), 1000)
    assert (found.rows_per_s, found.tokens_per_s, found.seen_s) == (5, 50, 60)
    assert found.done_in_s == (1000 - 300) / 5
    assert found.limit is Limit.REQUESTS


def test_two_moments_are_needed_to_predict() -> None:
    assert Recent().forecast(10) is None
    assert seen(1, 0).forecast(10) is None


def test_only_a_moving_run_has_an_end() -> None:
    assert forecast(seen(0, 60), 10).done_in_s is None
    assert forecast(seen(0, 60), 0).done_in_s == 0.0
    assert forecast(seen(0.1, 60), 10**12).done_in_s is None
    assert forecast(seen(1, 60), 60).done_in_s == 0.0


def test_only_the_last_minutes_count() -> None:
    """The rate that is shown is of the last seconds."""
    recent = Recent()
    for at_s in range(1000):  # ten rows a second until 700, then none but in the last half minute
        settled = min(at_s, 700) * 10 + max(0, at_s - (999 - int(RATE_S))) * 4
        recent.add(Sample(at_s, settled, settled, Limit.REQUESTS))
    found = forecast(recent, 10**6)
    assert found.rows_per_s == pytest.approx((10 + RATE_S * 4) / WINDOW_S)
    assert found.tokens_per_s == 4


def test_the_limit_that_bound_most_is_named() -> None:
    recent = seen(1, 20, Limit.LATENCY)
    seen(1, 40, Limit.TOKENS, into=recent, at_s=20.5)
    seen(1, 5, Limit.COOLING, into=recent, at_s=61)
    assert forecast(recent, 100).limit is Limit.TOKENS
    seen(1, int(WINDOW_S), Limit.BUDGET, into=recent, at_s=66.5)
    assert forecast(recent, 100).limit is Limit.BUDGET


def test_the_share_by_a_deadline_includes_settled_rows() -> None:
    found = forecast(seen(2, 60), 1000)
    assert found.share_by(100, 120, 1000) == pytest.approx(0.32)
    assert found.share_by(-5, 120, 1000) == pytest.approx(0.12)
    assert found.share_by(1e6, 120, 1000) == 1.0
    assert found.share_by(0, 0, 0) == 1.0


def test_a_concern_repeats_only_when_worse() -> None:
    concern = Concern(allotted_s=6 * 3600)
    reported = [share for share in (0.97, 0.95, 0.9, 0.88, 0.86, 0.8, 0.77, 0.9, 0.76) if concern.rises(share, 60)]
    assert reported == [0.97, 0.86, 0.76]


def test_a_concern_needs_data_and_a_reason() -> None:
    concern = Concern(allotted_s=6 * 3600)
    assert not concern.rises(0.5, 59)
    assert not concern.rises(0.99, 3600)
    assert concern.rises(0.5, 60)
    assert Concern(allotted_s=20).rises(0.5, 2)  # a tenth of it has passed


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300))
def test_expected_latency_covers_the_last_answer(latencies: list[float]) -> None:
    held = 0.0
    for latency in latencies:
        held = peak(held, latency)
        assert latency <= held <= max(latencies)


def test_one_slow_answer_is_soon_forgotten() -> None:
    held = peak(0.0, 900.0)
    for _ in range(500):
        held = peak(held, 1.0)
    assert 1.0 < held < 1.0 + 900 * (1 - LEAK) ** 500 + 1e-6 < 7
