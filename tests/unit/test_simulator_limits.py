"""The simulator's limits over a clock moved by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.simulator.limits import BURST_S, Limits, PlannedChange, duration_text
from batchrun.simulator.refusal import Refused


def _limits(requests: int | None = None, tokens: int | None = None, *, headers: bool = True) -> Limits:
    return Limits(requests, tokens, headers=headers, now_s=0.0)


def _is_admitted(limits: Limits, tokens: int, now_s: float) -> bool:
    try:
        limits.admit(tokens, now_s)
    except Refused:
        return False
    return True


@given(
    per_minute=st.integers(30, 6_000),
    gaps_s=st.lists(st.floats(0, 0.5), min_size=1, max_size=400),
)
def test_any_window_admits_its_rate_and_one_burst(per_minute: int, gaps_s: list[float]) -> None:
    limits = _limits(per_minute)
    now_s, admitted = 0.0, 0
    for gap_s in gaps_s:
        now_s += gap_s
        admitted += _is_admitted(limits, 1, now_s)
        assert admitted <= per_minute / 60 * (now_s + BURST_S) + 1e-6


def test_a_greedy_client_gets_the_whole_rate() -> None:
    limits = _limits(600)
    admitted = sum(_is_admitted(limits, 1, millisecond / 1_000) for millisecond in range(60_000))
    assert 618 <= admitted <= 620


def test_tokens_are_limited_like_requests() -> None:
    limits = _limits(None, 60_000)
    assert [_is_admitted(limits, 1_000, now_s) for now_s in (0, 0, 0, 0.5, 1.0)] == [True, True, False, False, True]


def test_an_oversized_request_leaves_a_debt() -> None:
    limits = _limits(None, 60_000)
    assert _is_admitted(limits, 5_000, 0.0)
    assert not _is_admitted(limits, 1, 3.0)
    assert not _is_admitted(limits, 5_000, 4.9)
    assert _is_admitted(limits, 5_000, 5.0)


def test_a_refusal_takes_nothing_of_either_limit() -> None:
    limits = _limits(60, 60_000)
    assert _is_admitted(limits, 2_000, 0.0)
    before = dict(limits.headers(0.0))
    assert not _is_admitted(limits, 2_000, 0.0)
    assert dict(limits.headers(0.0)) == before


def test_waiting_as_told_is_enough() -> None:
    limits = _limits(80)
    while _is_admitted(limits, 1, 0.0):
        pass
    with pytest.raises(Refused) as caught:
        limits.admit(1, 0.0)
    headers = dict(caught.value.headers)
    assert (caught.value.status, caught.value.code, caught.value.error_type) == (429, "rate_limit_exceeded", "requests")
    assert headers == {"Retry-After": "1", "retry-after-ms": "250"}
    assert not _is_admitted(limits, 1, 0.249)
    assert _is_admitted(limits, 1, 0.25)


def test_refusals_without_headers_state_whole_seconds() -> None:
    limits = _limits(60, headers=False)
    assert _is_admitted(limits, 1, 0.0)
    assert _is_admitted(limits, 1, 0.0)
    with pytest.raises(Refused) as caught:
        limits.admit(1, 0.25)
    assert caught.value.headers == (("Retry-After", "1"),)


def test_changed_limits_apply_on_time() -> None:
    changes = (
        PlannedChange(at_s=60, requests_per_minute=300),
        PlannedChange(at_s=120, requests_per_minute=600),
    )
    limits = Limits(600, None, headers=True, now_s=1_000.0, changes=changes)
    admitted = [0, 0, 0]
    for tick in range(180_000 // 10):
        admitted[tick * 10 // 60_000] += _is_admitted(limits, 1, 1_000.0 + tick / 100)
    assert 618 <= admitted[0] <= 620
    assert 299 <= admitted[1] <= 301
    assert 599 <= admitted[2] <= 601

    tokens = PlannedChange(at_s=1, tokens_per_minute=30_000)
    limits = Limits(None, 60_000, headers=True, now_s=0.0, changes=(tokens,))
    assert dict(limits.headers(0.9))["x-ratelimit-remaining-tokens"] == "2000"
    assert dict(limits.headers(1.0)) == {
        "x-ratelimit-limit-tokens": "30000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "0ms",
    }


def test_an_unseen_change_keeps_its_time() -> None:
    changes = (PlannedChange(at_s=1, requests_per_minute=60), PlannedChange(at_s=2, requests_per_minute=6_000))
    limits = Limits(600, None, headers=True, now_s=0.0, changes=changes)
    while _is_admitted(limits, 1, 0.0):
        pass
    # by 1 s ten have come back, of which two stay, and no more find room until 2 s; then 100 a second come
    assert dict(limits.headers(2.25))["x-ratelimit-remaining-requests"] == "27"


def test_headers_state_limit_remaining_reset() -> None:
    limits = _limits(600, 6_000_000)
    limits.admit(50_000, 0.0)
    assert dict(limits.headers(0.0)) == {
        "x-ratelimit-limit-requests": "600",
        "x-ratelimit-remaining-requests": "19",
        "x-ratelimit-reset-requests": "100ms",
        "x-ratelimit-limit-tokens": "6000000",
        "x-ratelimit-remaining-tokens": "150000",
        "x-ratelimit-reset-tokens": "500ms",
    }


def test_headers_can_be_switched_off() -> None:
    assert _limits(600, headers=False).headers(0.0) == ()
    assert _limits().headers(0.0) == ()
    assert all(_is_admitted(_limits(), 10**9, 0.0) for _ in range(3))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.25, "250ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"), (3_661, "1h1m1s")],
)
def test_durations_are_written_as_gateways_do(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.floats(0, 100_000))
def test_a_duration_is_never_shorter_than_the_wait(seconds: float) -> None:
    units = {"h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    parts = re.findall(r"([0-9.]+)(ms|[hms])", duration_text(seconds))
    assert seconds - 1e-4 <= sum(float(count) * units[unit] for count, unit in parts) <= seconds + 0.0011
