"""A bill is exact, counts cached tokens once, applies tiers request by request, and says when it does not know."""

from decimal import Decimal
from fractions import Fraction

import genai_prices
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun import prices
from batchrun.job.settings import Price
from batchrun.money import to_usd
from batchrun.price_list.lookup import resolve, vendor_at
from batchrun.prices import PriceTable, Tier, lacks_tier, requested_tier, upper_bound
from batchrun.records import Usage

TODAY = "2026-11-22"
GATEWAY = "http://localhost:4000/v1"
D = Decimal


def table(*tiers: tuple[int, str, str, str]) -> PriceTable:
    return PriceTable("m", tuple(Tier(start, D(a), D(b), D(c)) for start, a, b, c in tiers), "test", TODAY)


CODEX = table((0, "1.75", "0.175", "14"))
TIERED = table((0, "2.50", "0.25", "10"), (272_000, "5.00", "0.50", "15"))


def cost(usage: Usage | None, table: PriceTable | None, tier: str | None = None, at_s: float = 0.0) -> Decimal | None:
    """In USD."""
    pico_usd = prices.cost(usage, table, tier, at_s)
    return None if pico_usd is None else to_usd(pico_usd)


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


def test_tiers_apply_request_by_request() -> None:
    requests = [used(160_000, 0)] * 10
    assert sum(cost(usage, TIERED) or 0 for usage in requests) == D("4.00")
    assert cost(used(1_600_000, 0), TIERED) == D("8.00")


@pytest.mark.parametrize(("prompt", "usd"), [(272_000, "0.680"), (272_001, "1.360005")])
def test_a_tier_covers_the_whole_request(prompt: int, usd: str) -> None:
    assert cost(used(prompt, 0), TIERED) == D(usd)
    assert cost(used(prompt, 1_000_000), TIERED) == D(usd) + (10 if prompt == 272_000 else 15)


def test_the_smallest_price_is_not_rounded_away() -> None:
    assert cost(used(1, 0), table((0, "0.000001", "0.000001", "1"))) == D("1e-12")


def test_an_unknown_cost_is_not_zero() -> None:
    assert cost(None, CODEX) is None
    assert cost(used(1, 1), None) is None
    assert upper_bound(1, 1, None) is None
    assert resolve("vtrix-no-such-model", {}, TODAY, GATEWAY) is None


COUNT = st.integers(0, 2_000_000)
DIGITS = st.decimals(0, 1000, places=18)


@given(DIGITS, DIGITS, DIGITS, st.decimals(0, 1, places=24), COUNT, COUNT, COUNT)
@example(D("0.0000005"), D(0), D(0), D(0), 1, 0, 0)
@example(D("0.0000005"), D(0), D(0), D(0), 3, 0, 0)
@example(D("0.0000005"), D(0), D(0), D("1e-12"), 1, 0, 0)
def test_a_cost_is_rounded_once_half_even(
    each: Decimal, hit: Decimal, output: Decimal, fee: Decimal, prompt: int, completion: int, cached: int
) -> None:
    """Whatever digits the prices have."""
    long = msgspec.structs.replace(table((0, str(each), str(hit), str(output))), per_request=fee)
    cached = min(cached, prompt)
    micro = (prompt - cached) * Fraction(each) + cached * Fraction(hit) + completion * Fraction(output)
    exact = micro / 10**6 + Fraction(fee)
    assert prices.cost(used(prompt, completion, cached), long) == round(exact * 10**12)


USD = st.decimals(0, 1000, places=6)
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
def test_no_usage_exceeds_the_upper_bound(
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
def test_a_cost_fits_its_column(prices: PriceTable, prompt: int, completion: int) -> None:
    usd = cost(used(prompt, completion), prices)
    assert usd is not None
    assert 0 <= usd < 10**8


# -- where a price comes from


def test_a_vendor_model_uses_the_list_price() -> None:
    found = resolve("vtrix-gpt-5.3-codex", {}, TODAY, GATEWAY)
    assert found is not None
    assert found.tiers == CODEX.tiers
    assert (found.model, found.upstream, found.as_of) == ("vtrix-gpt-5.3-codex", "gpt-5.3-codex", TODAY)
    assert found.describe().startswith(
        "vtrix-gpt-5.3-codex: $1.75 in, $0.175 cached, $14 out per million tokens, other prices for fast, priority; "
        "the list price of OpenAI for gpt-5.3-codex, not the endpoint's own, by genai-prices "
    )


def test_a_listed_model_is_its_own() -> None:
    found = resolve("gpt-5.3-codex", {}, TODAY, "https://api.openai.com/v1")
    assert found is not None
    assert (found.upstream, found.vendor) == (None, "OpenAI")
    assert found.source.startswith("genai-prices 0.")


def test_the_jobs_price_precedes_lists() -> None:
    own = {"vtrix-gpt-5.3-codex": Price(D(1), D(2)), "x": Price(D(1), D(2), D("0.5"))}
    found = resolve("vtrix-gpt-5.3-codex", own, TODAY, GATEWAY)
    assert found is not None
    assert found.tiers == (Tier(0, D(1), D(1), D(2)),)
    assert found.source == "pricing table of the job"
    discounted = resolve("x", own, TODAY, GATEWAY)
    assert discounted is not None
    assert discounted.tiers[0].cached_input == D("0.5")


def test_a_higher_tier_is_reported() -> None:
    found = resolve("gemini-2.5-pro", {}, TODAY, GATEWAY)
    assert found is not None
    assert "higher beyond 200,000 tokens" in found.describe()


@pytest.mark.parametrize("model", ["gpt-5.3-codex", "gpt-4o", "gemini-2.5-pro", "claude-sonnet-4-5"])
@given(prompt=st.integers(1, 500_000), completion=st.integers(0, 100_000), part=st.integers(0, 100))
def test_our_tables_give_the_price_lists_own_price(model: str, prompt: int, completion: int, part: int) -> None:
    cached = prompt * part // 100
    theirs = genai_prices.calc_price(
        genai_prices.Usage(input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached), model_ref=model
    )
    assert cost(used(prompt, completion, cached), resolve(model, {}, TODAY, GATEWAY)) == theirs.total_price


# -- whose price, for which tier, at which hour

OPENAI, CEREBRAS, DEEPSEEK = "https://api.openai.com/v1", "https://api.cerebras.ai/v1", "https://api.deepseek.com"


@pytest.mark.parametrize(
    ("model", "url", "vendor", "usd"),
    [
        ("gpt-oss-120b", CEREBRAS, "Cerebras", "0.000425"),  # 1000 × 0.35 + 100 × 0.75
        ("gpt-oss-120b", GATEWAY, None, None),  # open weights: every host has its own price
        ("openai/gpt-oss-120b", "https://api.groq.com/openai/v1", "Groq", "0.00021"),
        ("openai/gpt-oss-120b", GATEWAY, None, None),
        ("openai/gpt-oss-120b", "https://api.together.ai/v1", "Together AI", "0.00021"),
        ("gpt-5-mini", OPENAI, "OpenAI", "0.00045"),
        ("gpt-5-mini-2025-08-07", OPENAI, "OpenAI", "0.00045"),
        ("gpt-5-mini-2031-01-01", OPENAI, None, None),  # a date that the list does not know
        ("gpt-4o-2024-05-13", OPENAI, "OpenAI", "0.0065"),  # more than gpt-4o: $5 and $15
        ("ft:gpt-4o-mini-2024-07-18:acme::x", OPENAI, "OpenAI", "0.00042"),
        ("gpt-5-mini", CEREBRAS, None, None),  # a vendor on the list that does not list it
        ("openai/gpt-5-mini", GATEWAY, "OpenAI", "0.00045"),
        ("vtrix-gpt-5-mini", "https://cloud.vtrix.ai/llm/v1", "OpenAI", "0.00045"),
        ("openai/gpt-5-mini", "https://openrouter.ai/api/v1", "OpenRouter", "0.00045"),
        ("my-own-model", GATEWAY, None, None),
        ("meta-llama/Llama-3.3-70B-Instruct", "http://localhost:8000/v1", None, None),
        ("sonar", "https://api.perplexity.ai", None, None),  # a fee that depends on the search
        ("models/gemini-2.5-flash", "https://generativelanguage.googleapis.com/v1beta/openai", "Google", "0.00055"),
    ],
)
def test_prices_are_of_the_endpoints_vendor(model: str, url: str, vendor: str | None, usd: str | None) -> None:
    found = resolve(model, {}, TODAY, url)
    assert (None if found is None else found.vendor) == vendor
    assert cost(used(1000, 100), found) == (None if usd is None else D(usd))


@pytest.mark.parametrize(
    ("url", "vendor"),
    [
        ("https://api.openai.com", "OpenAI"),
        ("https://API.OpenAI.com./v1", "OpenAI"),
        ("https://api.openai.com:8443/v1", "OpenAI"),
        ("https://api.openai.com.evil.example/v1", None),
        ("https://api.openai.community/v1", None),
        ("https://api.openai.com@evil.example/v1", None),
        ("https://evil.example/api.openai.com/v1", None),
        ("https://evil.example/https://api.openai.com", None),
        ("https://xapi.openai.com/v1", None),
        ("https://openrouter.ai.example/api/v1", None),
        ("https://api.together.ai/v1", "Together AI"),
        ("https://api.together.ai.example/v1", None),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "Google"),
        ("https://evil.example/generativelanguage.googleapis.com", None),
        ("https://googleapis.com.example/v1", None),
        ("https://mine.openai.azure.com/openai/v1", "Microsoft Azure"),
        ("https://mine.openai.azure.com.example/openai/v1", None),
        ("https://localhost/mine.openai.azure.com", None),
        ("https://api.moonshot.cn/v1", "MoonshotAi"),
        ("https://api.moonshot.ai.example/v1", None),
        ("https://router.huggingface.co/groq/openai/v1", "HuggingFace (groq)"),
        ("https://router.huggingface.co.example/groq", None),
        ("https://router.huggingface.co/groqx", None),
        ("https://bedrock-runtime.eu-west-1.amazonaws.com/openai/v1", "AWS Bedrock"),
        ("https://bedrock-runtime.eu-west-1.amazonaws.com.example/v1", None),
        ("http://127.0.0.1:8000/v1", None),
    ],
)
def test_a_host_must_match_wholly(url: str, vendor: str | None) -> None:
    found = vendor_at(url)
    assert (None if found is None else found.name) == vendor


@pytest.mark.parametrize(
    ("url", "model", "whose"),
    [
        ("https://bedrock-runtime.eu-west-1.amazonaws.com", "amazon.nova-lite-v1:0", "region"),
        ("https://europe-west4-aiplatform.googleapis.com/v1", "gemini-2.5-flash", "region"),
        ("https://eu.api.openai.com/v1", "gpt-5-mini", "list price of OpenAI for gpt-5-mini, not the endpoint's own"),
        (OPENAI, "gpt-5-mini", "the price of OpenAI by"),
        (DEEPSEEK, "deepseek-flash", "the price of Deepseek by"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-flash", "the price of Google by"),
    ],
)
def test_regional_models_have_the_plain_name(url: str, model: str, whose: str) -> None:
    found = resolve(model, {}, TODAY, url)
    assert found is not None
    plain = f"the plain list price of {found.vendor}, not that of the endpoint's region"
    assert (plain if whose == "region" else whose) in found.describe()


@pytest.mark.parametrize(
    ("tier", "usd"),
    [
        (None, "0.00045"),
        ("default", "0.00045"),
        ("flex", "0.000225"),
        ("priority", "0.00081"),
        ("scale", None),  # sold by contract: no list has its price
    ],
)
def test_a_stated_tier_has_its_price(tier: str | None, usd: str | None) -> None:
    found = resolve("gpt-5-mini", {}, TODAY, OPENAI)
    assert cost(used(1000, 100), found, tier) == (None if usd is None else D(usd))


def test_an_unpriced_tier_is_not_an_unpriced_model() -> None:
    found = resolve("gpt-5-mini", {}, TODAY, OPENAI)
    assert found is not None
    assert [lacks_tier(found, tier) for tier in (None, "default", "priority", "scale")] == [False, False, False, True]


def test_the_jobs_price_covers_every_tier() -> None:
    """It may have a fee per request."""
    own = {"m": Price(D(1), D(2), per_request=D("0.005"))}
    found = resolve("m", own, TODAY, GATEWAY)
    assert cost(used(1000, 100), found, "scale") == D("0.0062")
    assert upper_bound(1000, 100, found) == D("0.0062")


@pytest.mark.parametrize(
    ("body", "usd"),
    [
        (b'{"service_tier":"default"}', "0.00045"),
        (b'{"service_tier":"flex"}', "0.00045"),  # which may be served as an ordinary one
        (b'{"service_tier":"priority"}', "0.00081"),
        (b'{"service_tier":"auto"}', "0.00081"),  # what the account is set to
        (b"{}", "0.00081"),
        (rb'{"content":"\"service_tier\":\"flex\""}', "0.00081"),  # a text that speaks of it
    ],
)
def test_reservations_use_the_dearest_tier(body: bytes, usd: str) -> None:
    found = resolve("gpt-5-mini", {}, TODAY, OPENAI)
    assert upper_bound(1000, 100, found, requested_tier(found, body)) == D(usd)


@pytest.mark.parametrize(
    ("hour", "usd"), [(0.9, "0.00021"), (1, "0.00042"), (3.99, "0.00042"), (4, "0.00021"), (9, "0.00042")]
)
def test_a_timed_price_follows_the_hour(hour: float, usd: str) -> None:
    found = resolve("deepseek-flash", {}, TODAY, DEEPSEEK)
    assert cost(used(1000, 100), found, None, 86_400 * 20_000 + hour * 3600) == D(usd)
    assert upper_bound(1000, 100, found) == D("0.00042")


def test_reasoning_outside_the_completion_is_billed() -> None:
    grok = resolve("grok-4", {}, TODAY, "https://api.x.ai/v1")
    assert cost(Usage(5, 20, 175, None, 150), grok) == D("0.002565")


def test_tokens_written_to_a_cache_have_their_price() -> None:
    claude = resolve("claude-sonnet-4-5", {}, TODAY, "https://api.anthropic.com/v1")
    # 100 × 3 + 500 read × 0.30 + 400 written × 3.75 + 100 × 15, and for an hour 400 × 6
    assert cost(Usage(1000, 100, 1100, 500, None, 400), claude) == D("0.00345")
    assert cost(Usage(1000, 100, 1100, 500, None, 400, 400), claude) == D("0.00435")
