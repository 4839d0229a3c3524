"""No cap of the budget is ever passed, whatever the order of things; what can be spent is."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.limits.admission import Demand
from batchrun.limits.budget import BudgetAccount, Cap
from tests.money import pico

CENTS = st.integers(0, 500).map(lambda n: n * 10**10)
COUNTS = st.integers(0, 500)


class Plan(NamedTuple):
    """An attempt by its bounds, what it takes of them (None: unknown), and how many end after it has been sent."""

    bound_usd: int
    bound_tokens: int
    usd: int | None
    tokens: int | None
    ends: int


PLANS = st.builds(Plan, CENTS, COUNTS, st.none() | CENTS, st.none() | COUNTS, st.integers(0, 9))


def account(usd: int = pico(1), tokens: int = 100, requests: int = 10, spent: int = 0) -> BudgetAccount:
    return BudgetAccount(cost=Cap(usd, pico(spent)), tokens=Cap(tokens, spent), requests=Cap(requests, spent))


@given(st.lists(PLANS, max_size=60), CENTS, st.integers(0, 2000), st.integers(0, 40))
def test_spending_never_exceeds_a_cap(plans: list[Plan], usd: int, tokens: int, requests: int) -> None:
    budget = account(usd, tokens, requests)
    cost, used, sent = budget.cost, budget.tokens, budget.requests
    assert cost is not None
    assert used is not None
    assert sent is not None
    in_flight: list[tuple[Demand, Plan]] = []
    attempts = 0
    for plan in plans:
        demand = Demand(1, plan.bound_usd, plan.bound_tokens)
        if budget.fits(demand):
            budget.reserve(demand)
            in_flight.append((demand, plan))
            attempts += 1
        if plan.ends < len(in_flight):
            ended, its = in_flight.pop(plan.ends)
            spent_usd = None if its.usd is None else min(its.usd, its.bound_usd)
            budget.settle(ended, spent_usd, None if its.tokens is None else min(its.tokens, its.bound_tokens))
        assert cost.reserved == sum((plan.bound_usd for _, plan in in_flight), 0)
        assert used.reserved == sum(plan.bound_tokens for _, plan in in_flight)
        assert cost.spent + cost.reserved <= usd
        assert used.spent + used.reserved <= tokens
        assert sent.spent + sent.reserved == attempts <= requests


def test_unknown_usage_spends_its_reservation() -> None:
    budget = account(usd=pico(1), tokens=100, requests=2)
    demand = Demand(1, pico("0.60"), 60)
    budget.reserve(demand)
    assert not budget.fits(demand)
    budget.settle(demand, None, None)
    assert budget.refusal(demand) == (
        "the budget is used up: $0.60 of $1.00 spent, and the next request may cost $0.60; raise budget.max_cost_usd; "
        "60 of 100 tokens used, and the next request may use 60; raise budget.max_tokens and run again"
    )


@pytest.mark.parametrize("bound", [Demand(1, pico("0.10"), 0), Demand(1, 0, 10), Demand(1, 0, 0)])
def test_the_last_unit_can_be_spent(bound: Demand) -> None:
    budget = BudgetAccount(cost=Cap(pico("0.30"), pico("0.20")), tokens=Cap(30, 20), requests=Cap(3, 2))
    assert budget.fits(bound)
    budget.reserve(bound)
    assert not budget.fits(Demand(1, pico("0.100000000001"), 11))


@pytest.mark.parametrize(
    ("demand", "setting"),
    [
        (Demand(1, pico("1.01"), 0), "max_cost_usd"),
        (Demand(1, 0, 101), "max_tokens"),
        (Demand(1, 0, 0), "max_requests"),
    ],
)
def test_each_cap_names_what_to_raise(demand: Demand, setting: str) -> None:
    budget = account(requests=0 if setting == "max_requests" else 10)
    assert not budget.fits(demand)
    assert budget.refusal(demand).endswith(f"raise budget.{setting} and run again")
    assert budget.refusal(demand).count("raise") == 1


def test_a_cap_that_is_not_set_limits_nothing() -> None:
    demand = Demand(1, None, 10**9)
    budget = BudgetAccount(requests=Cap(2, 0))
    budget.reserve(demand)
    budget.settle(demand, None, None)
    assert budget.fits(demand)


def test_a_cost_cap_needs_an_upper_bound() -> None:
    with pytest.raises(ValueError, match="upper bound"):
        account().fits(Demand(1, None))
