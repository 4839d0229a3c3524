"""Money between the integer that is counted with and the Decimal that is written."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.money import in_words, to_pico, to_usd


@given(st.integers(-(2**63), 2**63 - 1))
def test_money_survives_both_ways(amount: int) -> None:
    assert to_pico(to_usd(amount)) == amount


@pytest.mark.parametrize(("usd", "text"), [("5.000", "5"), ("50", "50"), ("0.20", "0.2"), ("0", "0"), ("-1.5", "-1.5")])
def test_money_is_written_without_spare_zeros(usd: str, text: str) -> None:
    """Summaries, logs and messages have the cap as the job has it."""
    assert str(to_usd(to_pico(Decimal(usd)))) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(200_000_000_000, "$0.20"), (194_642_000_000, "$0.194642"), (5 * 10**15, "$5,000.00")]
)
def test_sums_in_messages_have_cents(amount: int, text: str) -> None:
    assert in_words(amount) == text
