"""Tokens come back with time, exactly at the limit, whatever the sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.limits.token_bucket import BURST_S, Bucket

SIZES = st.lists(st.integers(1, 5_000), min_size=50, max_size=200)


@given(SIZES, st.sampled_from([600.0, 60_000.0, 200_000.0]))
def test_the_long_run_rate_equals_the_limit(sizes: list[int], limit: float) -> None:
    bucket = Bucket(limit, now_s=0.0)
    now_s = 0.0
    for tokens in sizes:
        while (wait_s := bucket.ready_in_s(tokens, now_s)) > 0:
            now_s += wait_s
        bucket.take(tokens, now_s)
    paid_off_s = now_s + bucket.ready_in_s(bucket.capacity, now_s)
    allowed = limit / 60 * paid_off_s
    assert sum(sizes) == pytest.approx(allowed, rel=1e-6, abs=1e-3)


@given(st.lists(st.tuples(st.integers(1, 5_000), st.integers(1, 5_000)), min_size=20, max_size=100))
def test_wrong_estimates_are_corrected_to_the_token(asks: list[tuple[int, int]]) -> None:
    limit = 60_000.0
    bucket = Bucket(limit, now_s=0.0)
    now_s = 0.0
    for estimate, actual in asks:
        while (wait_s := bucket.ready_in_s(estimate, now_s)) > 0:
            now_s += wait_s
        bucket.take(estimate, now_s)
        bucket.settle(actual - estimate)
    paid_off_s = now_s + bucket.ready_in_s(bucket.capacity, now_s)
    assert sum(actual for _, actual in asks) == pytest.approx(limit / 60 * paid_off_s, rel=1e-6, abs=1e-3)


def test_an_oversized_request_waits_and_leaves_debt() -> None:
    bucket = Bucket(6_000, now_s=0.0)
    assert bucket.capacity == 100 * BURST_S
    bucket.take(1, 0.0)
    assert bucket.ready_in_s(1_000, 0.0) == pytest.approx(0.01)
    bucket.take(1_000, 0.01)
    assert bucket.ready_in_s(1, 0.01) == pytest.approx(9.01)


def test_a_pause_saves_the_burst_only() -> None:
    bucket = Bucket(6_000, now_s=0.0)
    assert bucket.ready_in_s(100, 86_400.0) == 0.0
    bucket.take(100, 86_400.0)
    assert bucket.ready_in_s(100, 86_400.0) == pytest.approx(1.0)


def test_forced_takes_return_no_counted_time() -> None:
    bucket = Bucket(6_000, now_s=0.0)
    bucket.take(100, 5.0)
    assert bucket.ready_in_s(100, 5.0) == pytest.approx(1.0)


def test_a_refund_never_exceeds_the_burst() -> None:
    bucket = Bucket(6_000, now_s=0.0)
    bucket.settle(-1_000_000)
    bucket.take(100, 0.0)
    assert bucket.ready_in_s(1, 0.0) > 0
