"""Headers about limits: every form they come in is read, and nonsense is as if it had not been sent."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.limits.rate_headers import StatedLimit, duration_s, read_limit
from batchrun.simulator.limits import duration_text
from tests import level


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("1h2m3.5s", 3_723.5),
        ("2m59.56s", 179.56),
        ("1d", 86_400.0),
        ("1m", 60.0),
        ("12", 12.0),
        ("0.25", 0.25),
        (" 7s ", 7.0),
        ("0s", 0.0),
        ("53µs", 0.0),
        *((text, None) for text in ("", "s", "soon", "-1s", "1e9", "nan", "1s1m", "2026-11-25T20:00:00Z", "1 s")),
        (None, None),
    ],
)
def test_a_reset_is_read_in_every_form(text: str | None, seconds: float | None) -> None:
    assert duration_s(text) == (None if seconds is None else pytest.approx(seconds))


@given(st.integers(0, 10_000_000))
def test_the_simulators_reset_is_exact(milliseconds: int) -> None:
    assert duration_s(duration_text(milliseconds / 1_000)) == pytest.approx(milliseconds / 1_000, rel=1e-5, abs=1e-6)


@settings(max_examples=level.amount(8, 50))
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_no_header_raises_or_misleads(limit: str, left: str, reset: str) -> None:
    said = read_limit(headers(limit, left, reset), "requests")
    assert said is None or (said.per_minute > 0 and (said.remaining is None or 0 <= said.remaining <= said.per_minute))


def headers(limit: str | None, remaining: str | None = None, reset: str | None = None) -> dict[str, str]:
    named = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{name}-requests": text for name, text in named.items() if text is not None}


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (headers("3000", "99", "20ms"), StatedLimit(3_000, 99, 0.02)),
        (headers("3000"), StatedLimit(3_000)),
        (headers("3000", "nonsense", "soon"), StatedLimit(3_000)),
        (headers("3000", "-1"), StatedLimit(3_000)),
        (headers("3000", "3001"), StatedLimit(3_000)),
        (headers(None, "99", "20ms"), None),
        (headers("0"), None),
        (headers("-5"), None),
        (headers("unlimited"), None),
        (headers("1e6"), None),
        (headers("99999999999999"), None),
        (headers("14400", "14370", "2m59.56s"), None),  # a limit per day
        (headers("14400", "14399", "6s"), None),  # the same, just started: 6 s a request are 14,400 a day
        (headers("1000", "999", "1m26.4s"), None),
        (headers("3600", "3500", "1m40s"), None),  # an hour
        (headers("3600", "3599", "1s"), None),
        (headers("3000", "2999", "20ms"), StatedLimit(3_000, 2_999, 0.02)),
        (headers("3000", "2900", "59s"), StatedLimit(3_000, 2_900, 59.0)),  # the rest of a minute
        ({}, None),
    ],
)
def test_implausible_header_values_are_ignored(sent: dict[str, str], said: StatedLimit | None) -> None:
    assert read_limit(sent, "requests") == said
    assert read_limit(sent, "tokens") is None
