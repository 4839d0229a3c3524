"""A deadline is read once, in every form that people write, and kept on a clock that never jumps."""

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import JobError
from batchrun.limits.deadline import Deadline, in_words, parse

BERLIN = ZoneInfo("Europe/Berlin")
NOW_S = 5_000.0


def local(wall: datetime) -> datetime:
    return wall.replace(tzinfo=BERLIN)


def at_clock(text: str, day: str = "2026-11-25T22:30:15") -> Deadline:
    """The deadline as it is seen in Berlin when clocks show `day`."""
    return parse(text, local(datetime.fromisoformat(day)), NOW_S, local)


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("6h", timedelta(hours=6)),
        ("90m", timedelta(minutes=90)),
        ("1h30m", timedelta(minutes=90)),
        ("45s", timedelta(seconds=45)),
        ("0.5h", timedelta(minutes=30)),
        ("2d", timedelta(days=2)),
        ("06:00", timedelta(hours=7, minutes=29, seconds=45)),
        ("6:00", timedelta(hours=7, minutes=29, seconds=45)),
        ("22:31", timedelta(seconds=45)),
        ("22:30", timedelta(days=1, seconds=-15)),
        ("22:30:15", timedelta(days=1)),
        ("22:30:16", timedelta(seconds=1)),
        ("2026-11-26T06:00", timedelta(hours=7, minutes=29, seconds=45)),
        ("2026-11-26 06:00", timedelta(hours=7, minutes=29, seconds=45)),
        ("2026-11-26T06:00+00:00", timedelta(hours=8, minutes=29, seconds=45)),
    ],
)
def test_durations_times_of_day_and_moments_are_read(text: str, ahead: timedelta) -> None:
    found = at_clock(text)
    assert found.at_s == NOW_S + ahead.total_seconds()
    assert found.at.astimezone(UTC) == local(datetime(2026, 11, 25, 22, 30, 15)).astimezone(UTC) + ahead


@pytest.mark.parametrize(
    ("text", "hours"),
    [("06:00", 8.0), ("8h", 8.0)],  # of the night in which clocks go back, at 3, from the evening before
)
def test_an_hour_that_clocks_repeat_is_an_hour(text: str, hours: float) -> None:
    assert at_clock(text, "2026-10-24T23:00:00").at_s == NOW_S + hours * 3600


@pytest.mark.parametrize(
    "text", ["", "soon", "6", "-6h", "25:00", "06:60", "6h 30m", "h", "6 h", "2026-13-01T00:00", "1:2"]
)
def test_nonsense_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(
        JobError, match=r"^--deadline .*: expected a duration \(6h, 90m\), a time \(06:00\) or a moment"
    ):
        at_clock(text)


@pytest.mark.parametrize("text", ["0h", "0s", "2026-11-25T22:30:15", "2026-11-25T22:00", "2020-01-01"])
def test_what_is_over_already_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="is in the past; name a later one"):
        at_clock(text)


def test_a_time_beyond_a_year_is_refused() -> None:
    with pytest.raises(JobError, match="more than a year ahead"):
        at_clock("9999h")
    with pytest.raises(JobError, match="expected a duration"):
        at_clock("999999999999d")


@given(st.floats(0.001, 1e6), st.floats(0, 1e4))
def test_the_last_request_leaves_time_for_its_answer(allotted_s: float, latency_s: float) -> None:
    """But it never goes before half of the time is over."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    deadline = Deadline(moment, NOW_S, NOW_S + allotted_s)
    last_s = deadline.last_send_s(latency_s)
    assert NOW_S + allotted_s / 2 - 1e-6 <= last_s <= deadline.at_s
    assert last_s + latency_s <= deadline.at_s + 1e-6 or latency_s > allotted_s / 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("23:15", "23:15"), ("45s", "22:31"), ("46s", "22:31:01"), ("06:00", "Thu 06:00"), ("9d", "2026-12-04 22:30")],
)
def test_another_days_time_shows_its_day(text: str, words: str) -> None:
    assert str(at_clock(text)) == words


def test_the_day_is_of_the_local_zone() -> None:
    tokyo = timezone(timedelta(hours=9))
    at = datetime(2026, 11, 26, 6, 0, tzinfo=tokyo)
    assert in_words(at, datetime(2026, 11, 25, 20, 0, tzinfo=UTC)) == "06:00"
