"""A bill is exact, counts cached tokens once, applies tiers request by request, and says when it does not know."""

from decimal import Decimal

import genai_prices
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.job.job import Price
from batchrun.prices import PriceTable, Tier, cost, resolve, upper_bound
from batchrun.records import Usage

TODAY = "2026-11-22"
D = Decimal


def table(*tiers: tuple[int, str, str, str]) -> PriceTable:
    return PriceTable("m", tuple(Tier(start, D(a), D(b), D(c)) for start, a, b, c in tiers), "test", TODAY)


CODEX = table((0, "1.75", "0.175", "14"))
TIERED = table((0, "2.50", "0.25", "10"), (272_000, "5.00", "0.50", "15"))


def used(prompt: int, completion: int, cached: int | None = None, reasoning: int | None = None) -> Usage:
    return Usage(prompt, completion, prompt + completion, cached, reasoning)


@pytest.mark.parametrize(
    ("usage", "usd"),
    [
        (used(0, 0), "0"),
        (used(1, 0), "0.00000175"),
        (used(0, 1), "0.000014"),
        (used(1_000_000, 0), "1.75"),
        (used(1000, 100), "0.00315"),
        (used(1000, 100, cached=0), "0.00315"),
        (used(1000, 100, cached=400), "0.00252"),  # 600 × 1.75 + 400 × 0.175 + 100 × 14
        (used(1000, 100, cached=1000), "0.001575"),
        (used(1000, 100, cached=5000), "0.001575"),  # cached is a part of prompt, whatever the server says
        (used(1000, 100, cached=1, reasoning=90), "0.003148425"),  # reasoning is a part of completion
    ],
)
def test_a_cost_is_the_exact_sum(usage: Usage, usd: str) -> None:
    assert cost(usage, CODEX) == D(usd)


def test_tiers_apply_to_each_request_and_not_to_their_sum() -> None:
    requests = [used(160_000, 0)] * 10
    assert sum(cost(usage, TIERED) or 0 for usage in requests) == D("4.00")
    assert cost(used(1_600_000, 0), TIERED) == D("8.00")


@pytest.mark.parametrize(("prompt", "usd"), [(272_000, "0.680"), (272_001, "1.360005")])
def test_a_tier_begins_above_its_threshold_and_covers_the_whole_request(prompt: int, usd: str) -> None:
    assert cost(used(prompt, 0), TIERED) == D(usd)
    assert cost(used(prompt, 1_000_000), TIERED) == D(usd) + (10 if prompt == 272_000 else 15)


def test_the_smallest_price_is_not_rounded_away() -> None:
    assert cost(used(1, 0), table((0, "0.000001", "0.000001", "1"))) == D("1e-12")


def test_what_is_unknown_costs_none_and_not_zero() -> None:
    assert cost(None, CODEX) is None
    assert cost(used(1, 1), None) is None
    assert upper_bound(1, 1, None) is None
    assert resolve("vtrix-no-such-model", {}, TODAY) is None


USD = st.decimals(0, 1000, places=6)
COUNT = st.integers(0, 2_000_000)
TABLES = st.lists(
    st.tuples(st.integers(1, 2_000_000), USD, USD, USD), min_size=1, max_size=3, unique_by=lambda tier: tier[0]
).map(
    lambda tiers: PriceTable(
        "m",
        tuple(Tier(0 if place == 0 else start, a, b, c) for place, (start, a, b, c) in enumerate(sorted(tiers))),
        "test",
        TODAY,
    )
)


@given(TABLES, COUNT, COUNT, st.none() | COUNT, st.integers(0, 1000), st.integers(0, 1000))
def test_no_usage_within_the_bounds_costs_more_than_the_upper_bound(
    prices: PriceTable, prompt: int, completion: int, cached: int | None, more_prompt: int, more_completion: int
) -> None:
    bound, paid = (
        upper_bound(prompt + more_prompt, completion + more_completion, prices),
        cost(used(prompt, completion, cached), prices),
    )
    assert bound is not None
    assert paid is not None
    assert 0 <= paid <= bound


@given(TABLES, st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_cost_fits_the_column_it_is_stored_in(prices: PriceTable, prompt: int, completion: int) -> None:
    usd = cost(used(prompt, completion), prices)
    assert usd is not None
    assert usd.as_tuple().exponent == -12
    assert len(usd.as_tuple().digits) <= 20


# -- where a price comes from


def test_the_vendors_model_has_the_upstreams_list_price_and_says_so() -> None:
    found = resolve("vtrix-gpt-5.3-codex", {}, TODAY)
    assert found is not None
    assert found.tiers == CODEX.tiers
    assert (found.model, found.upstream, found.as_of) == ("vtrix-gpt-5.3-codex", "gpt-5.3-codex", TODAY)
    assert found.describe().startswith(
        "vtrix-gpt-5.3-codex: $1.75 in, $0.175 cached, $14 out per million tokens; "
        "the list price of gpt-5.3-codex by genai-prices "
    )


def test_a_listed_model_is_its_own() -> None:
    found = resolve("gpt-5.3-codex", {}, TODAY)
    assert found is not None
    assert found.upstream is None
    assert found.source.startswith("genai-prices 0.")


def test_the_jobs_own_price_goes_before_any_list() -> None:
    own = {"vtrix-gpt-5.3-codex": Price(D(1), D(2)), "x": Price(D(1), D(2), D("0.5"))}
    found = resolve("vtrix-gpt-5.3-codex", own, TODAY)
    assert found is not None
    assert found.tiers == (Tier(0, D(1), D(1), D(2)),)
    assert found.source == "pricing table of the job"
    discounted = resolve("x", own, TODAY)
    assert discounted is not None
    assert discounted.tiers[0].cached_input == D("0.5")


def test_a_dearer_tier_is_told() -> None:
    found = resolve("gemini-2.5-pro", {}, TODAY)
    assert found is not None
    assert "dearer beyond 200,000 tokens" in found.describe()


@pytest.mark.parametrize("model", ["gpt-5.3-codex", "gpt-4o", "gemini-2.5-pro", "claude-sonnet-4-5"])
@given(prompt=st.integers(1, 500_000), completion=st.integers(0, 100_000), part=st.integers(0, 100))
def test_our_tables_give_the_price_lists_own_price(model: str, prompt: int, completion: int, part: int) -> None:
    cached = prompt * part // 100
    theirs = genai_prices.calc_price(
        genai_prices.Usage(input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached), model_ref=model
    )
    assert cost(used(prompt, completion, cached), resolve(model, {}, TODAY)) == theirs.total_price
