"""Runs at other prices: what the new prices do not cover keeps its cost."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from batchrun.job.settings import Price
from batchrun.report import bill, reprice, runs
from tests.bills import bill_over
from tests.result_files import MODEL, row, write_result

NEW = {MODEL: Price(input=Decimal(10), output=Decimal(20))}
AT_NEW = (100 * 10 + 10 * 20) * Decimal("1e-6")
"""The cost of a row of text at the new prices."""


@pytest.mark.parametrize(
    ("cost", "unpriced"),
    [
        ({"cost_usd": None, "answer_cost_usd": None}, 3),
        ({"cost_usd": Decimal("0.5"), "answer_cost_usd": Decimal("0.5"), "reported_cost_usd": Decimal("0.5")}, 0),
    ],
)
def test_audio_and_searches_are_not_repriced_as_text(tmp_path: Path, cost: dict[str, Any], unpriced: int) -> None:
    """Whether the server stated their cost or not; a run of text is repriced."""
    write_result(tmp_path / "heard", [row(n, **cost) for n in range(3)], unpriced_usage=["audio", "web searches"])
    write_result(tmp_path / "text", [row(n) for n in range(2)])
    found = runs.find_runs([tmp_path]).found
    again = reprice.repriced(found, NEW)
    assert reprice.total(again.found) == 2 * AT_NEW + 3 * (cost["cost_usd"] or 0)
    assert sum(line.unpriced for each in again.found for line in each.account.totals) == unpriced
    kept = f"3 attempts of {MODEL} kept the cost they had, since some used audio, web searches, "
    (named,) = again.kept
    assert named.startswith(kept)
    made = bill.what_if(bill_over([tmp_path], ("model",)), "new.toml", Decimal(1), Decimal(2), again.kept)
    assert (made.supposed or "").endswith(named)


def test_a_run_of_text_is_repriced_whole(tmp_path: Path) -> None:
    """Attempts whose price was unknown get one; a cost that the server stated as well is replaced."""
    unknown = {"cost_usd": None, "answer_cost_usd": None}
    write_result(tmp_path / "run", [row(0, **unknown), row(1, reported_cost_usd=Decimal("0.5"))])
    again = reprice.repriced(runs.find_runs([tmp_path]).found, NEW)
    assert (reprice.total(again.found), again.kept) == (2 * AT_NEW, ())
