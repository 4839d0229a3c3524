"""What the limits of a job allow by a moment; how long rows take at least is held in tests/test_estimate.py."""

import pytest

from batchrun.gate import daily
from batchrun.gate.capacity import Size, most_rows, size_of
from batchrun.gate.daily import DailyCount
from batchrun.job.job import Limits
from batchrun.records import TotalsLine

SIZE = Size(prompt_tokens=30, completion_tokens=20, answers=1)


@pytest.mark.parametrize(
    ("limits", "rows", "limit", "pace"),
    [
        (Limits(requests_per_minute=600), 100, "rpm", "600 requests a minute"),
        (Limits(requests_per_second=2, requests_per_minute=600), 20, "rps", "2 requests a second"),
        (Limits(tokens_per_minute=1_500, requests_per_minute=600), 5, "tpm", "1,500 tokens a minute"),
        (Limits(tokens_per_minute=2_000, input_tokens_per_minute=900), 5, "input tpm", "900 input tokens a minute"),
        (Limits(tokens_per_minute=1_500, output_tokens_per_minute=120), 1, "output tpm", "120 output tokens a minute"),
        (Limits(requests_per_minute=600, requests_per_day=50), 40, "requests per day", "50 requests a day"),
    ],
)
def test_the_limit_that_allows_least_by_a_moment_is_named(limits: Limits, rows: float, limit: str, pace: str) -> None:
    most = most_rows(limits, 10.0, SIZE, day_requests=40)
    assert most is not None
    assert (most.rows, str(most.limit), most.pace) == (rows, limit, pace)


def test_no_limit_and_a_limit_on_tokens_of_unknown_rows_say_nothing() -> None:
    assert most_rows(Limits(), 10.0, SIZE, None) is None
    tokens = Limits(tokens_per_minute=10, input_tokens_per_minute=10, output_tokens_per_minute=10)
    assert most_rows(tokens, 10.0, size_of([]), None) is None


def test_the_size_of_a_row_is_the_mean_of_the_answers_that_told_their_usage() -> None:
    told = TotalsLine(1, "m", "ok", rows=4, prompt_tokens=400, completion_tokens=40)
    assert size_of([told, TotalsLine(1, "m", "error", rows=9)]) == Size(100, 10, 4)


@pytest.mark.parametrize(("until_s", "most"), [(0, 6), (100, 6), (100.1, 16), (100 + 86_400, 16), (100 + 86_400.1, 26)])
def test_what_the_days_allow_is_what_is_left_of_today_and_every_day_that_begins(until_s: float, most: int) -> None:
    assert DailyCount(10, made=4, ends_s=100.0).most(until_s) == most


@pytest.mark.parametrize(("requests", "least_s"), [(1, 0), (10, 0), (11, 100), (20, 100), (21, 86_500), (31, 172_900)])
def test_requests_beyond_a_days_wait_for_the_midnights_between(requests: int, least_s: float) -> None:
    assert daily.least_s(requests, 10, day_left_s=100.0) == least_s
