"""A full service tier is known by its words; what is reserved, and when a row goes to another tier."""

from decimal import Decimal

import pytest

from batchrun import attempt_caps, policy, prices
from batchrun.dispatch.attempt_result import history_of
from batchrun.dispatch.serving import Serving
from batchrun.job.load import from_tables
from batchrun.job.settings import Price, Retry, TierPrice
from batchrun.policy import CAPACITY
from batchrun.prices import PriceTable
from batchrun.records import Attempt, Usage, Verdict
from batchrun.response import answer as answers
from tests.endings import discarded
from tests.money import pico

OPENAI = b'{"error":{"message":"Resource Unavailable. Try again later.","code":"resource_unavailable"}}'
GROQ = b'{"error":{"message":"Flex tier capacity exceeded","type":"internal_server_error","code":"capacity_exceeded"}}'
RATE = b'{"error":{"message":"Rate limit reached for requests per min","type":"requests","code":"rate_limit_exceeded"}}'
RATE_AND_CAPACITY = b'{"error":{"message":"You are at your capacity of 60 requests per minute","code":"rate_limit"}}'


def attempt(status: int, body: bytes) -> Attempt:
    return Attempt(0.0, 1.0, status, {}, body)


@pytest.mark.parametrize(
    ("status", "body", "in_flex", "kind"),
    [
        (429, OPENAI, True, CAPACITY),
        (498, GROQ, True, CAPACITY),
        (503, b'{"error":{"message":"No capacity is available in this tier"}}', True, CAPACITY),
        (429, b"Resource unavailable", True, CAPACITY),
        (429, OPENAI, False, "rate_limit"),
        (429, RATE, True, "rate_limit"),
        (429, RATE_AND_CAPACITY, True, "rate_limit"),
        (500, OPENAI, True, "server_error"),
    ],
)
def test_only_a_full_tier_is_a_capacity_refusal(status: int, body: bytes, in_flex: bool, kind: str) -> None:
    ended = attempt(status, body)
    judgement = policy.judge(ended, answers.parse(body), Retry(), tier_may_be_full=in_flex)
    assert judgement.error is not None
    assert judgement.error.kind == kind
    assert judgement.is_capacity == (kind == CAPACITY)
    if judgement.is_capacity:
        assert judgement.verdict is Verdict.SLOW
        assert not judgement.is_chargeable
        assert not judgement.is_refusal


def test_a_capacity_refusal_counts_against_no_cap() -> None:
    judgement = policy.judge(attempt(429, OPENAI), answers.parse(OPENAI), Retry(), tier_may_be_full=True)
    history = attempt_caps.NEW
    for _ in range(100):
        history = attempt_caps.after(history, judgement, corroborated=True, at_end=True)
        history = attempt_caps.refused(history, judgement, corroborated=True, at_end=True)
    assert history == attempt_caps.History(attempts=100, capacity_refusals=100)
    assert not attempt_caps.exhausted(history, Retry())
    assert not attempt_caps.is_refused_for_good(history, Retry(), 0.0)


def test_a_later_start_knows_a_rows_capacity_refusals() -> None:
    earlier = [discarded(0, n, verdict=Verdict.SLOW, counted=False, error_kind=CAPACITY) for n in (1, 2)]
    assert history_of(earlier, 2) == attempt_caps.History(attempts=2, capacity_refusals=2)


def test_waits_for_capacity_double_to_a_limit() -> None:
    retry = Retry(backoff_base_s=1.0, max_wait_s=900.0)
    histories = [attempt_caps.History(capacity_refusals=refusals) for refusals in (1, 2, 5, 40)]
    waits = [attempt_caps.capacity_wait_s(history, None, retry, 1.0) for history in histories]
    assert waits == [1.0, 2.0, 16.0, 900.0]


def _own(**tiers: tuple[str, str]) -> PriceTable:
    by_tier = {name: TierPrice(Decimal(given[0]), Decimal(given[1])) for name, given in tiers.items()}
    return prices.stated("m", Price(Decimal(2), Decimal(10), tiers=by_tier), "2026-11-28")


def test_the_budget_reserves_the_dearest_tier() -> None:
    table = _own(flex=("1", "5"), priority=("4", "20"))
    requested: list[tuple[str | None, ...]] = [("flex",), ("flex", "priority"), (None,)]
    bounds = [prices.upper_bound(1_000_000, 0, table, *tiers) for tiers in requested]
    assert bounds == [2, 4, 4]  # flex may be served as the plain tier
    tables = {"endpoint": {"url": "simulator"}, "request": {"service_tier": "flex"}, "tiers": {"fallback": "priority"}}
    job = from_tables(tables)
    assert job.service_tiers == ("flex", "priority")


def test_rows_change_tiers_before_a_deadline() -> None:
    """And not at each beat."""
    tables = {"endpoint": {"url": "simulator"}, "request": {"service_tier": "flex"}, "tiers": {"fallback": "default"}}
    serving = Serving(from_tables(tables), "columns", lambda: 0.0)
    chosen = [serving.choose_tier(done_in_s, 100.0) for done_in_s in (70.0, 81.0, 79.0, 60.0, 49.0, 79.0, None)]
    assert chosen == [None, "default", None, None, "flex", None, "default"]
    del tables["tiers"]
    assert Serving(from_tables(tables), "columns", lambda: 0.0).choose_tier(None, 1.0) is None


def test_a_tier_is_billed_at_the_jobs_prices() -> None:
    table = _own(flex=("1", "5"))
    usage = Usage(1_000_000, 0, 1_000_000)
    costs = [prices.cost(usage, table, tier) for tier in (None, "default", "flex", "odd")]
    assert costs == [pico(2), pico(2), pico(1), pico(2)]
