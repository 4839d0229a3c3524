"""What the limits of a job allow by a moment; the shortest time for rows is tested in test_estimate.py."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.job.settings import Limits
from batchrun.limits import daily
from batchrun.limits.capacity import Size, least_minutes, most_rows, size_of
from batchrun.limits.daily import DailyCount
from batchrun.run_summary import TotalsLine
from tests.limited_server import Run, Server, new_gate, send_all
from tests.moved_clock import run_on_moved_clock

SIZE = Size(prompt_tokens=30, completion_tokens=20, answers=1)


@pytest.mark.parametrize(
    ("limits", "rows", "limit", "pace"),
    [
        (Limits(requests_per_minute=600), 121, "rpm", "600 requests a minute"),
        (Limits(requests_per_second=2, requests_per_minute=600), 25, "rps", "2 requests a second"),
        (Limits(tokens_per_minute=1_500, requests_per_minute=600), 7, "tpm", "1,500 tokens a minute"),
        (Limits(tokens_per_minute=2_000, input_tokens_per_minute=900), 7, "input tpm", "900 input tokens a minute"),
        (
            Limits(tokens_per_minute=1_500, output_tokens_per_minute=120),
            2.2,
            "output tpm",
            "120 output tokens a minute",
        ),
        (Limits(requests_per_minute=600, requests_per_day=50), 40, "requests per day", "50 requests a day"),
    ],
)
def test_the_tightest_limit_by_then_is_named(limits: Limits, rows: float, limit: str, pace: str) -> None:
    most = most_rows(limits, 10.0, SIZE, day_requests=40)
    assert most is not None
    assert most.rows == pytest.approx(rows)
    assert (str(most.limit), most.pace) == (limit, pace)
    assert most.by_mean == ("tokens" in pace)


@settings(max_examples=20, deadline=None)
@given(st.floats(20, 6_000), st.floats(0.1, 30), st.booleans(), st.sampled_from([10, 500, 5_000]))
def test_the_gate_stays_within_computed_capacity(
    per_minute: float, within_s: float, by_tokens: bool, tokens: int
) -> None:
    """A server that has ten times as much, and says so in its headers: the bursts are as large as they can be."""
    name = "tokens_per_minute" if by_tokens else "requests_per_minute"
    reported = {name: per_minute * tokens if by_tokens else per_minute}
    limits = msgspec.convert(reported, Limits)
    size = Size(prompt_tokens=tokens / 2, completion_tokens=tokens / 2, answers=1)
    most = most_rows(limits, within_s, size, None)
    assert most is not None

    async def main() -> None:
        run = Run(Server(int(10 * per_minute) + 100, int(10 * per_minute * tokens) + 100 * tokens))
        gate = new_gate(run, max_in_flight=64, first_in_flight=64, **reported)  # type: ignore[arg-type]
        rows = int(most.rows) + 20
        await send_all(run, gate, [tokens] * rows, estimate=lambda row: tokens)
        assert len(run.server.accepted(until_s=within_s)) <= most.rows
        least = least_minutes(limits, rows, size, 0.0)
        assert least is not None
        assert least[0] * 60 <= run.took_s

    run_on_moved_clock(main())


def test_unknown_row_sizes_bound_no_capacity() -> None:
    assert most_rows(Limits(), 10.0, SIZE, None) is None
    tokens = Limits(tokens_per_minute=10, input_tokens_per_minute=10, output_tokens_per_minute=10)
    assert most_rows(tokens, 10.0, size_of([]), None) is None


def test_row_size_is_the_mean_of_stated_usage() -> None:
    reported = TotalsLine(1, "m", "ok", rows=4, prompt_tokens=400, completion_tokens=40)
    assert size_of([reported, TotalsLine(1, "m", "error", rows=9)]) == Size(100, 10, 4)


@pytest.mark.parametrize(("until_s", "most"), [(0, 6), (100, 6), (100.1, 16), (100 + 86_400, 16), (100 + 86_400.1, 26)])
def test_daily_limits_add_up_over_days(until_s: float, most: int) -> None:
    """What is left of today, and every day that starts until then."""
    assert DailyCount(10, made=4, ends_s=100.0).most(until_s) == most


@pytest.mark.parametrize(("requests", "least_s"), [(1, 0), (10, 0), (11, 100), (20, 100), (21, 86_500), (31, 172_900)])
def test_requests_beyond_a_day_wait_for_midnight(requests: int, least_s: float) -> None:
    assert daily.least_s(requests, 10, day_left_s=100.0) == least_s
