"""A cap on cost says what it does not hold back: fees for what the server itself does."""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from batchrun import prices
from batchrun.job.settings import Price
from batchrun.startup import search_fees
from tests.jobs import job_over, write_lines

MODEL = "gpt-5-mini"
TODAY = datetime(2026, 11, 29, tzinfo=UTC).date().isoformat()
OWN = prices.stated(MODEL, Price(input=Decimal(1), output=Decimal(2)), TODAY)
LISTED = prices.PriceTable(MODEL, OWN.tiers, "a list", TODAY)
WITH_FEE = prices.stated(MODEL, Price(input=Decimal(1), output=Decimal(2), per_request=Decimal("0.01")), TODAY)


def warned(tmp_path: Path, extra: dict[str, Any], table: prices.PriceTable, model: str = MODEL, **tables: Any) -> str:
    source = write_lines(tmp_path / "in.jsonl", [{"text": "a"}])
    request = {"model": model, "prompt": "{{ text }}", "max_tokens": 10, "extra": extra}
    job = job_over(source, **{"request": request, "budget": {"max_cost_usd": 1}, **tables})
    return str(search_fees.warning(job, {model: table}) or "")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"web_search_options": {}}, "request.extra.web_search_options"),
        ({"tools": [{"type": "web_search"}]}, "request.extra.tools: web_search"),
        ({"plugins": [{"id": "web"}]}, "request.extra.plugins"),
        ({"search_parameters": {"mode": "auto"}}, "request.extra.search_parameters"),
        ({"enable_search": True}, "request.extra.enable_search"),
    ],
)
def test_a_cap_names_fees_it_cannot_reserve(tmp_path: Path, extra: dict[str, Any], named: str) -> None:
    for table in (LISTED, OWN):
        line = warned(tmp_path, extra, table)
        assert line.startswith("warning: ")
        assert named in line
        assert "budget.max_cost_usd does not reserve them" in line
        assert f'per_request with the prices in [pricing."{MODEL}"]' in line
        assert "\n" not in line


def test_a_model_that_always_searches_is_named(tmp_path: Path) -> None:
    assert "request.model openai/gpt-5-mini:online" in warned(tmp_path, {}, LISTED, "openai/gpt-5-mini:online")


def test_without_cap_or_search_no_fee_is_named(tmp_path: Path) -> None:
    """The job's own fee of a request is reserved and billed; functions are run by the caller."""
    search: dict[str, Any] = {"web_search_options": {}}
    assert warned(tmp_path, search, WITH_FEE) == ""
    assert warned(tmp_path, search, LISTED, budget={}) == ""
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert warned(tmp_path, {"tools": [function], "enable_search": False, "plugins": []}, LISTED) == ""
