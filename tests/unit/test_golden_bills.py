"""The bill is that vendor's: usages as vendors state them, each with its bill by hand and its source."""

from pathlib import Path

import pytest

from tests.golden_bills import Bill, billed, bills, table

BILLS = bills()


@pytest.mark.parametrize("bill", BILLS, ids=[f"{bill.vendor}: {bill.what}" for bill in BILLS])
def test_an_answer_is_billed_as_its_vendor(bill: Bill) -> None:
    if bill.parts:
        assert sum(tokens * price for tokens, price in bill.parts) == (bill.usd or 0) * 1_000_000, "the line itself"
    assert billed(bill) == bill.usd


def test_there_are_forty_shapes_of_ten_vendors() -> None:
    assert len(BILLS) >= 40
    assert len({bill.vendor for bill in BILLS}) >= 10


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "golden_bills.md").read_text("utf-8")
    assert "\n".join(table()) in page
