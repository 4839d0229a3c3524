"""The gates of several endpoints: who gets the next attempt, and when admission ends."""

import asyncio
from collections import Counter

import pytest

from batchrun.errors import ExitCode
from batchrun.job.settings import Limits
from batchrun.limits.admission import Demand, Limit, Outcome, Stop
from batchrun.limits.budget import BudgetAccount, Cap
from batchrun.limits.circuit import Circuit
from batchrun.limits.gate import Gate, GateClosed
from batchrun.limits.gates import Circuits, Gates, Lane
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rates import RateLimits, Rates
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.records import RowError, Verdict
from tests.moved_clock import run_on_moved_clock

SMALL = Demand(10)
UNLIMITED = Limits()
UNPAID = RowError("http", 402, None, "no balance")


def gates_of(*weights: float, limits: Limits = UNLIMITED, most: int = 64, budget: BudgetAccount | None = None) -> Gates:
    """One gate for each weight. All have these limits."""
    loop = asyncio.get_running_loop()
    lanes = list[Lane]()
    shared = SharedAdmission(loop, Circuits(lanes), budget)
    for number, weight in enumerate(weights):
        circuit = Circuit(
            in_flight=InFlight(most, most),
            max_outage_s=60,
            resumed=True,
            uniform=lambda: 0.0,
            on_change=lambda before, after: None,
        )
        lanes.append(Lane(f"e{number}", Gate(circuit, shared, RateLimits(limits, loop.time())), weight))
    return Gates(shared, lanes)


async def use(gates: Gates) -> int:
    """One attempt that is answered; the endpoint that it went to."""
    slot = await gates.admit(SMALL)
    index = gates.index_of(slot)
    gates.settle(slot, 10)
    gates.observe(slot, Outcome(slot, Verdict.OK))
    gates.release(slot, None)
    return index


def test_endpoints_take_turns_by_weight() -> None:
    async def shares() -> Counter[int]:
        gates = gates_of(3, 1)
        return Counter([await use(gates) for _ in range(40)])

    assert run_on_moved_clock(shares()) == {0: 30, 1: 10}


def test_an_unblocked_endpoint_gets_its_share() -> None:
    """No more than that."""

    async def shares() -> Counter[int]:
        gates = gates_of(1, 1, most=4)
        held = [await gates.admit(SMALL) for _ in range(8)]
        for slot in held[0::2]:
            gates.release(slot, None)
        assert {await use(gates) for _ in range(50)} == {0}
        for slot in held[1::2]:
            gates.release(slot, None)
        return Counter([await use(gates) for _ in range(40)])

    assert run_on_moved_clock(shares()) == {0: 20, 1: 20}


def test_the_rates_of_all_endpoints_add_up() -> None:
    async def seconds() -> float:
        gates = gates_of(1, 1, limits=Limits(requests_per_minute=600))
        loop = asyncio.get_running_loop()
        started = loop.time()
        for _ in range(220):
            await use(gates)
        assert gates.in_force.requests_per_minute == 1_200
        return loop.time() - started

    assert run_on_moved_clock(seconds()) == pytest.approx(10, abs=0.2)


def test_rows_of_an_endpoint_set_aside_go_elsewhere() -> None:
    async def story() -> None:
        gates = gates_of(1, 1)
        first, second = [slot for slot in [await gates.admit(SMALL) for _ in range(4)] if gates.index_of(slot) == 0]
        one = gates.observe(first, Outcome(1, Verdict.PAUSE, UNPAID))
        assert one.hold
        assert gates.observe(second, Outcome(2, Verdict.PAUSE, UNPAID)).hold
        (later,) = [slot for slot in [await gates.admit(SMALL) for _ in range(2)] if gates.index_of(slot) == 0]
        three = gates.observe(later, Outcome(3, Verdict.PAUSE, UNPAID))
        assert (three.hold, sorted(three.elsewhere)) == (False, [1, 2, 3])
        assert gates.stop is None
        assert {await use(gates) for _ in range(5)} == {1}
        assert "e0: set aside, HTTP 402" in (gates.refusals or "")
        assert gates.restore(0, "a new key")
        assert not gates.restore(1, "a new key")
        assert 0 in {await use(gates) for _ in range(5)}

    run_on_moved_clock(story())


def test_the_last_endpoint_set_aside_ends_admission() -> None:
    async def story() -> Stop | None:
        gates = gates_of(1, 1)
        for first_row in (0, 4):
            for row, slot in enumerate([await gates.admit(SMALL) for _ in range(4 if not first_row else 2)], first_row):
                decision = gates.observe(slot, Outcome(row, Verdict.PAUSE, UNPAID))
        assert decision.hold
        with pytest.raises(GateClosed, match="no endpoint is left"):
            await gates.admit(SMALL)
        return gates.stop

    stop = run_on_moved_clock(story())
    assert stop is not None
    assert stop.exit_code is ExitCode.PAUSED


def test_one_budget_is_kept_over_all_endpoints() -> None:
    async def story() -> None:
        gates = gates_of(1, 1, budget=BudgetAccount(requests=Cap(3, 0)))
        held = [await gates.admit(SMALL) for _ in range(3)]
        waiting = asyncio.create_task(gates.admit(SMALL))
        await asyncio.sleep(1)
        assert gates.binding.limit is Limit.BUDGET
        for slot in held:
            gates.release(slot, None)
        with pytest.raises(GateClosed, match="3 of 3 requests sent"):
            await waiting
        assert gates.stop is not None

    run_on_moved_clock(story())


def test_only_budgets_can_be_tuned() -> None:
    async def story() -> None:
        gates = gates_of(1, 1)
        gates.tune()
        for rates, in_flight in ((Rates(requests_per_minute=5), None), (Rates(), 5)):
            with pytest.raises(ValueError, match="only the budget"):
                gates.tune(rates, max_in_flight=in_flight)

    run_on_moved_clock(story())
