"""One FIFO queue for every limit; no row overtakes another; nothing is lost when a worker leaves. On a moved clock."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import ExitCode
from batchrun.job.settings import Limits
from batchrun.limits.adaptive_rate import RateChange
from batchrun.limits.admission import Binding, Decision, Demand, Limit, Outcome, Stop
from batchrun.limits.budget import BudgetAccount, Cap
from batchrun.limits.circuit import Circuit
from batchrun.limits.daily import DailyCount
from batchrun.limits.gate import Gate, GateClosed
from batchrun.limits.in_flight import InFlight
from batchrun.limits.overruns import Overruns
from batchrun.limits.rates import RateLimits, Rates
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.records import RowError, Verdict
from batchrun.report.limit_lines import limits_in_words
from tests import level
from tests.money import pico
from tests.moved_clock import NothingWillHappen, run_on_moved_clock

SMALL = Demand(tokens=1)
RATE_LIMIT = RowError("rate_limit", 429, None, "HTTP 429")
SERVER_ERROR = RowError("server_error", 500, None, "HTTP 500")


def new_gate(
    *,
    max_in_flight: int = 8,
    daily: DailyCount | None = None,
    budget: BudgetAccount | None = None,
    overruns: Overruns | None = None,
    on_rate_change: RateChange = lambda limit, before, after, why: None,
    **limits: Any,
) -> Gate:
    state = Circuit(
        in_flight=InFlight(max_in_flight),
        max_outage_s=7_200.0,
        resumed=False,
        uniform=random.Random(1).random,
        on_change=lambda before, after: None,
    )
    loop = asyncio.get_running_loop()
    rates = RateLimits(Limits(**limits), loop.time(), daily=daily, on_rate_change=on_rate_change)
    return Gate(state, SharedAdmission(loop, state, budget), rates, overruns=overruns)


def money(cap: int, spent: int = 0) -> BudgetAccount:
    return BudgetAccount(cost=Cap(cap, spent))


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def turns(coroutine: Coroutine[object, object, int]) -> asyncio.Task[int]:
    """The task of a worker that has come as far as it can without time passing."""
    task = asyncio.create_task(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


async def use(gate: Gate, ask: Demand, *, row: int = 0, work_s: float = 0.0) -> float:
    """One row from admission to durable, without trouble; when it was admitted."""
    slot = await gate.admit(ask)
    admitted_at_s = now_s()
    if work_s:
        await asyncio.sleep(work_s)
    gate.settle(slot, ask.tokens)
    gate.observe(slot, Outcome(row, Verdict.OK))
    gate.release(slot, 0)
    return admitted_at_s


def on_moved_clock(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """The test, run on a clock that jumps."""

    async def main() -> None:
        await test()

    def run() -> None:
        run_on_moved_clock(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# pace


@pytest.mark.heavy
@settings(max_examples=level.amount(5, 25), deadline=None)
@given(st.sampled_from([7.0, 60.0, 90.0, 119.0, 600.0, 6_000.0]))
def test_the_request_rate_is_kept_and_used(limit: float) -> None:
    """From the first minute on."""

    async def main() -> None:
        gate = new_gate(requests_per_minute=limit)
        admitted_at_s = [await use(gate, SMALL) for _ in range(int(limit * 5) + 1)]
        burst = max(1.0, limit / 60)
        for i, at_s in enumerate(admitted_at_s):
            assert i + 1 <= burst + (at_s - admitted_at_s[0]) * limit / 60 + 1e-6
        took_s = admitted_at_s[-1] - admitted_at_s[0]
        assert len(admitted_at_s) >= 0.995 * took_s * limit / 60

    run_on_moved_clock(main())


@settings(max_examples=level.amount(5, 25), deadline=None)
@given(st.lists(st.integers(1, 9_000), min_size=50, max_size=100), st.sampled_from([6_000.0, 200_000.0]))
def test_the_token_rate_is_kept_and_used(sizes: list[int], limit: float) -> None:
    """Whatever the sizes."""

    async def main() -> None:
        gate = new_gate(tokens_per_minute=limit)
        first_s = now_s()
        taken = 0
        for tokens in sizes:
            at_s = await use(gate, Demand(tokens))
            assert taken + min(tokens, limit / 60) <= limit / 60 * (1 + at_s - first_s) + 1e-3
            taken += tokens
        at_s = await use(gate, SMALL)
        assert taken >= 0.995 * limit / 60 * (at_s - first_s)

    run_on_moved_clock(main())


@on_moved_clock
async def test_actual_tokens_shift_the_next_request() -> None:
    """A long answer delays it, a short one brings it forward."""
    for actual, wait_s in ((100, 0.6), (40, 0.0), (160, 1.2)):
        gate = new_gate(tokens_per_minute=6_000)
        slot = await gate.admit(Demand(100))
        gate.settle(slot, actual)
        start_s = now_s()
        await gate.admit(Demand(60))
        assert now_s() - start_s == pytest.approx(wait_s)


@on_moved_clock
async def test_a_refund_releases_the_first_waiter() -> None:
    gate = new_gate(tokens_per_minute=6_000)
    slot = await gate.admit(Demand(1_000_000))
    waiting = await turns(gate.admit(Demand(50)))
    assert gate.binding.limit is Limit.TOKENS
    assert gate.binding.until_s == pytest.approx(now_s() + 9_999.5)
    start_s = now_s()
    gate.settle(slot, 50)
    await waiting
    assert now_s() == start_s


@on_moved_clock
async def test_an_answer_without_usage_leaves_the_estimate_standing() -> None:
    gate = new_gate(tokens_per_minute=6_000)
    gate.settle(await gate.admit(Demand(100)), None)
    start_s = now_s()
    await gate.admit(Demand(50))
    assert now_s() - start_s == pytest.approx(0.5)


@on_moved_clock
async def test_idle_hours_save_one_second_only() -> None:
    gate = new_gate(requests_per_minute=600, tokens_per_minute=6_000)
    await use(gate, SMALL)
    await asyncio.sleep(36_000)
    start_s = now_s()
    admitted_at_s = [await use(gate, SMALL) for _ in range(20)]
    assert sum(at_s == start_s for at_s in admitted_at_s) == 10


@on_moved_clock
async def test_input_and_output_have_separate_limits() -> None:
    for limit, ask in (
        ("input_tokens_per_minute", Demand(100, output_tokens=10)),
        ("output_tokens_per_minute", Demand(100, output_tokens=90)),
    ):
        gate = new_gate(**dict[str, Any]({limit: 5_400}))
        start_s = now_s()
        for _ in range(60):
            slot = await gate.admit(ask)
            gate.settle(slot, 100, ask.output_tokens)
            gate.observe(slot, Outcome(0, Verdict.OK))
            gate.release(slot, None)
        assert now_s() - start_s == pytest.approx(59.0)  # one second of the limit is there at the start


@on_moved_clock
async def test_input_and_output_are_settled_separately() -> None:
    gate = new_gate(input_tokens_per_minute=6_000, output_tokens_per_minute=6_000)
    gate.settle(await gate.admit(Demand(100, output_tokens=50)), 160, 150)
    waiting = await turns(gate.admit(Demand(20, output_tokens=10)))
    assert gate.binding.limit is Limit.OUTPUT_TOKENS
    start_s = now_s()
    await waiting
    assert now_s() - start_s == pytest.approx(0.6)


@on_moved_clock
async def test_a_limit_per_second_holds_within_every_second() -> None:
    gate = new_gate(requests_per_second=5, requests_per_minute=6_000)
    admitted_at_s = [await use(gate, SMALL) for _ in range(100)]
    for first_s in admitted_at_s:
        assert sum(first_s <= at_s < first_s + 1 for at_s in admitted_at_s) <= 10
    assert admitted_at_s[-1] - admitted_at_s[0] == pytest.approx(19.0, abs=0.1)
    waiting = await turns(gate.admit(SMALL))
    assert gate.binding.limit is Limit.REQUESTS_PER_SECOND
    await waiting


@on_moved_clock
async def test_daily_requests_wait_for_the_next_day() -> None:
    start_s = now_s()
    gate = new_gate(daily=DailyCount(10, made=4, ends_s=start_s + 3_600))
    admitted_at_s = [await use(gate, SMALL) - start_s for _ in range(27)]
    assert admitted_at_s == [0.0] * 6 + [3_600.0] * 10 + [90_000.0] * 10 + [176_400.0]
    for _ in range(9):
        await use(gate, SMALL)
    waiting = await turns(gate.admit(SMALL))
    assert gate.binding == Binding(Limit.REQUESTS_PER_DAY, start_s + 3_600 + 3 * 86_400)
    await waiting


# other limits while it works


@on_moved_clock
async def test_every_active_limit_is_described() -> None:
    gate = new_gate(
        requests_per_second=2,
        requests_per_minute=60,
        daily=DailyCount(1_000, made=0, ends_s=now_s() + 60),
        tokens_per_minute=9_000,
        input_tokens_per_minute=6_000,
        output_tokens_per_minute=3_000,
    )
    assert limits_in_words(gate.in_force) == (
        "2 requests/s, 60 requests/min, 1,000 requests/day, "
        "9,000 tokens/min, 6,000 input tokens/min, 3,000 output tokens/min, 8 in flight"
    )


@on_moved_clock
async def test_new_limits_apply_at_once() -> None:
    changes: list[tuple[Limit, float | None, float | None, str]] = []
    gate = new_gate(requests_per_minute=6_000, on_rate_change=lambda *change: changes.append(change))
    for _ in range(300):
        await use(gate, SMALL)
    gate.tune(Rates(requests_per_minute=600, tokens_per_minute=6_000))
    start_s = now_s()
    for _ in range(100):
        await use(gate, SMALL)
    assert now_s() - start_s == pytest.approx(10.0, abs=0.2)
    gate.tune(Rates(requests_per_minute=6_000))
    start_s = now_s()
    for _ in range(100):
        await use(gate, SMALL)
    assert now_s() - start_s == pytest.approx(1.0, abs=0.2)
    assert changes == [
        (Limit.REQUESTS, 6_000, 600, "configured"),
        (Limit.REQUESTS, 600, 6_000, "configured"),
    ]


@pytest.mark.parametrize(
    ("before", "rates", "per_s"),
    [
        ({}, Rates(requests_per_second=5), 5),
        ({"requests_per_second": 50}, Rates(requests_per_second=5), 5),
        ({}, Rates(requests_per_minute=300), 5),
        ({}, Rates(tokens_per_minute=30_000), 5),
        ({}, Rates(input_tokens_per_minute=18_000), 5),
        ({"input_tokens_per_minute": 1_000_000}, Rates(input_tokens_per_minute=18_000), 5),
        ({}, Rates(output_tokens_per_minute=12_000), 5),
    ],
)
def test_a_tuned_rate_always_applies(before: dict[str, Any], rates: Rates, per_s: float) -> None:
    async def main() -> None:
        gate, sent_s = new_gate(**before), list[float]()
        for row in range(61):
            slot = await gate.admit(Demand(100, output_tokens=40))
            sent_s.append(now_s())
            gate.settle(slot, 100, 40)
            gate.observe(slot, Outcome(row, Verdict.OK))
            gate.release(slot, 0)
            if not row:
                gate.tune(rates)
        # the first ten may be what a fresh limiter, or what is left of a bucket, lets through
        assert sent_s[-1] - sent_s[10] == pytest.approx(50 / per_s, rel=0.02)

    run_on_moved_clock(main())


@on_moved_clock
async def test_a_tuned_daily_limit_delays_the_rest() -> None:
    gate = new_gate()
    gate.tune(Rates(daily=DailyCount(5, 3, now_s() + 600)))
    start_s = now_s()
    sent_s = [await use(gate, SMALL) - start_s for _ in range(4)]
    assert [round(at_s) for at_s in sent_s] == [0, 0, 600, 600]
    assert gate.in_force.requests_per_day == 5


@on_moved_clock
async def test_a_faster_rate_releases_waiters() -> None:
    gate = new_gate(requests_per_minute=1)
    await gate.admit(SMALL)
    waiting = await turns(gate.admit(SMALL))
    start_s = now_s()
    gate.tune(Rates(requests_per_minute=6_000))
    await waiting
    assert now_s() - start_s == pytest.approx(0.01)


@on_moved_clock
async def test_lower_concurrency_applies_as_slots_return() -> None:
    gate = new_gate(max_in_flight=4)
    slots = [await gate.admit(SMALL) for _ in range(4)]
    gate.tune(max_in_flight=2)
    waiting = await turns(gate.admit(SMALL))
    for slot in slots[:2]:
        gate.observe(slot, Outcome(slot, Verdict.OK))
        gate.release(slot, 0)
    assert not waiting.done()
    gate.observe(slots[2], Outcome(2, Verdict.OK))
    gate.release(slots[2], 0)
    gate.release(await waiting, 0)
    gate.tune(max_in_flight=1_000)
    for row in range(20):
        await use(gate, SMALL, row=row)
    more = [await turns(gate.admit(SMALL)) for _ in range(4)]
    assert [task.done() for task in more] == [True, True, True, False]


# slots


@on_moved_clock
async def test_every_request_in_flight_has_its_slot() -> None:
    gate = new_gate(max_in_flight=4)
    slots = [await gate.admit(SMALL) for _ in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    waiting = await turns(gate.admit(SMALL))
    assert (gate.in_flight, waiting.done(), gate.binding) == (4, False, Binding(Limit.IN_FLIGHT))
    gate.observe(slots[2], Outcome(2, Verdict.OK))
    assert not (await turns(gate.admit(SMALL))).done()
    gate.release(slots[2], 0)
    assert await waiting == slots[2]


@on_moved_clock
async def test_only_the_slots_needed_are_used() -> None:
    gate = new_gate(max_in_flight=64)
    used = set()
    for _ in range(50):
        slots = [await gate.admit(SMALL) for _ in range(3)]
        used.update(slots)
        for slot in slots:
            gate.release(slot, None)
    assert used == {0, 1, 2}


@on_moved_clock
async def test_a_slot_is_settled_exactly_once() -> None:
    gate = new_gate()
    slot = await gate.admit(SMALL)
    gate.settle(slot, 1)
    gate.observe(slot, Outcome(0, Verdict.OK))
    with pytest.raises(AssertionError, match="settled twice"):
        gate.settle(slot, 1)
    with pytest.raises(AssertionError, match="observed twice"):
        gate.observe(slot, Outcome(0, Verdict.OK))
    gate.release(slot, None)
    with pytest.raises(KeyError):
        gate.release(slot, None)


# the line


class Plan(NamedTuple):
    """What one worker does: what it asks for, how long it works, and when it is cancelled if it still waits."""

    tokens: int
    usd: int
    work_s: float
    cancelled_after_s: float | None


PLANS = st.lists(
    st.builds(
        Plan,
        st.integers(1, 300),
        st.integers(0, 60).map(pico),
        st.floats(0, 3),
        st.none() | st.floats(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=level.amount(16, 100), deadline=None)
@given(
    PLANS,
    st.integers(1, 8),
    st.sampled_from([None, 60.0, 6_000.0]),
    st.sampled_from([None, 6_000.0]),
)
def test_the_queue_is_strictly_first_in_first_out(
    plans: list[Plan], max_in_flight: int, rpm: float | None, tpm: float | None
) -> None:
    """Whatever the sizes, costs and cancellations."""

    async def main() -> None:
        gate = new_gate(
            max_in_flight=max_in_flight,
            requests_per_minute=rpm,
            tokens_per_minute=tpm,
            budget=money(pico(100)),
        )
        admitted: list[int] = []
        cancelled: set[int] = set()

        async def worker(row: int, plan: Plan) -> None:
            slot = await gate.admit(Demand(plan.tokens, plan.usd))
            admitted.append(row)
            await asyncio.sleep(plan.work_s)
            gate.observe(slot, Outcome(row, Verdict.OK))
            gate.release(slot, 0)

        def cancel(row: int) -> None:
            if row not in admitted:
                cancelled.add(row)
                tasks[row].cancel()

        tasks = [asyncio.create_task(worker(row, plan)) for row, plan in enumerate(plans)]
        for row, plan in enumerate(plans):
            if plan.cancelled_after_s is not None:
                asyncio.get_running_loop().call_later(plan.cancelled_after_s, cancel, row)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert admitted == sorted(admitted)
        assert set(admitted) == set(range(len(plans))) - cancelled
        assert (gate.in_flight, gate.binding) == (0, Binding(Limit.LATENCY))

    run_on_moved_clock(main())


@on_moved_clock
async def test_a_large_prompt_keeps_its_turn() -> None:
    gate = new_gate(tokens_per_minute=6_000)
    await gate.admit(Demand(50))
    admitted: list[int] = []

    async def worker(tokens: int) -> None:
        await gate.admit(Demand(tokens))
        admitted.append(tokens)

    await asyncio.gather(worker(1_000), worker(1), worker(2))
    assert admitted == [1_000, 1, 2]


@on_moved_clock
async def test_a_waiter_reserves_nothing_early() -> None:
    budget = money(pico(10))
    gate = new_gate(max_in_flight=1, requests_per_minute=60, tokens_per_minute=6_000, budget=budget)
    slot = await gate.admit(Demand(100, pico(1)))
    waiting = await turns(gate.admit(Demand(100, pico(2))))
    await asyncio.sleep(10)
    assert budget.cost is not None
    assert budget.cost.reserved == pico(1)
    waiting.cancel()
    await asyncio.sleep(0)
    gate.release(slot, pico(1))
    start_s = now_s()
    await gate.admit(Demand(100, pico(3)))
    assert now_s() == start_s
    assert budget.cost.reserved == pico(3)


@on_moved_clock
async def test_a_leaving_waiter_frees_the_next() -> None:
    gate = new_gate(tokens_per_minute=6_000)
    await gate.admit(Demand(100))
    large = await turns(gate.admit(Demand(100)))
    small = await turns(gate.admit(Demand(10)))
    start_s = now_s()
    large.cancel()
    await small
    assert now_s() - start_s == pytest.approx(0.1)


def test_no_timer_remains_without_waiters() -> None:
    left_at_s: list[float] = []

    async def main() -> None:
        gate = new_gate(requests_per_minute=1)
        await gate.admit(SMALL)
        waiting = await turns(gate.admit(SMALL))
        assert gate.binding == Binding(Limit.REQUESTS, now_s() + 60)
        waiting.cancel()
        await asyncio.sleep(0)
        assert gate.binding == Binding(Limit.LATENCY)
        left_at_s.append(now_s())
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            left_at_s.append(now_s())

    with pytest.raises(NothingWillHappen):
        run_on_moved_clock(main())
    assert left_at_s[0] == left_at_s[1]


# money


CENTS = st.integers(0, 50).map(lambda n: n * 10**10)


@settings(max_examples=level.amount(16, 100), deadline=None)
@given(
    st.lists(st.tuples(CENTS, st.none() | CENTS, st.floats(0, 3)), min_size=1, max_size=20),
    st.integers(0, 300).map(lambda n: n * 10**10),
    CENTS,
)
def test_spending_and_reservations_respect_the_cap(
    rows: list[tuple[int, int | None, float]], cap: int, spent_before: int
) -> None:
    async def main() -> None:
        bill = min(cap, spent_before)
        gate = new_gate(budget=money(cap, bill))
        in_flight: dict[int, int] = {}

        async def worker(row: int, bound: int, cost: int | None, work_s: float) -> None:
            nonlocal bill
            slot = await gate.admit(Demand(1, bound))
            in_flight[row] = bound
            assert bill + sum(in_flight.values()) <= cap
            await asyncio.sleep(work_s)
            bill += min(in_flight.pop(row), bound if cost is None else cost)
            gate.release(slot, None if cost is None else min(bound, cost))

        ends = await asyncio.gather(*(worker(i, *row) for i, row in enumerate(rows)), return_exceptions=True)
        stopped = [end for end in ends if end is not None]
        assert all(isinstance(end, GateClosed) and end.exit_code is ExitCode.STOPPED for end in stopped)
        first_refused = next((bound for (bound, _, _), end in zip(rows, ends, strict=True) if end), None)
        assert first_refused is None or bill + first_refused > cap

    run_on_moved_clock(main())


@settings(max_examples=level.amount(16, 100), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.none() | st.integers(0, 50), st.floats(0, 3), st.integers(1, 4)), min_size=1
    ),
    st.integers(0, 600),
    st.integers(0, 30),
    st.integers(0, 20),
)
def test_token_and_request_caps_are_kept(
    rows: list[tuple[int, int | None, float, int]], max_tokens: int, max_requests: int, before: int
) -> None:
    """Whatever is retried, and whatever is never known."""

    async def main() -> None:
        used, sent, bounds = min(before, max_tokens), min(before, max_requests), 0
        gate = new_gate(budget=BudgetAccount(tokens=Cap(max_tokens, used), requests=Cap(max_requests, sent)))

        async def worker(row: int, bound: int, tokens: int | None, work_s: float, attempts: int) -> None:
            nonlocal used, sent, bounds
            for _ in range(attempts):
                slot = await gate.admit(Demand(1, None, bound))
                sent, bounds = sent + 1, bounds + bound
                assert sent <= max_requests
                assert used + bounds <= max_tokens
                await asyncio.sleep(work_s)
                took = bound if tokens is None else min(bound, tokens)
                used, bounds = used + took, bounds - bound
                gate.release(slot, None, None if tokens is None else took)

        ends = await asyncio.gather(*(worker(i, *row) for i, row in enumerate(rows)), return_exceptions=True)
        stopped = [end for end in ends if end is not None]
        assert all(isinstance(end, GateClosed) and end.exit_code is ExitCode.STOPPED for end in stopped)
        if stopped:  # as much was used as could be
            assert sent == max_requests or used + max(bound for bound, *_ in rows) > max_tokens

    run_on_moved_clock(main())


@on_moved_clock
async def test_a_recorded_bound_has_64_bits() -> None:
    """A slot and a record have no room for more; the budget counts all of it."""
    budget = money(pico(10**9))
    gate = new_gate(budget=budget)
    slot = await gate.admit(Demand(1, pico(10**9), 9))
    assert gate.bound(slot) == (2**63 - 1, 9)
    assert budget.cost is not None
    assert budget.cost.reserved == pico(10**9)


@on_moved_clock
async def test_an_unaffordable_row_waits_then_stops() -> None:
    budget = money(pico("1.00"))
    gate = new_gate(budget=budget)
    first = await gate.admit(Demand(1, pico("0.60")))
    waiting = await turns(gate.admit(Demand(1, pico("0.50"))))
    assert (waiting.done(), gate.binding) == (False, Binding(Limit.BUDGET))
    gate.release(first, pico("0.10"))
    second = await waiting
    third = await turns(gate.admit(Demand(1, pico("0.50"))))
    gate.release(second, None)
    with pytest.raises(GateClosed, match=r"\$0\.60 of \$1\.00 spent, and the next request may cost \$0\.50") as closed:
        await third
    assert closed.value.exit_code is ExitCode.STOPPED
    with pytest.raises(GateClosed):
        await gate.admit(Demand(1, 0))


@on_moved_clock
async def test_a_tiny_budget_stops_before_sending() -> None:
    gate = new_gate(budget=money(pico("0.01")))
    with pytest.raises(GateClosed, match="budget"):
        await gate.admit(Demand(1, pico("0.02")))


@on_moved_clock
async def test_without_a_cap_a_known_bound_limits_nothing() -> None:
    gate = new_gate(max_in_flight=1)
    for _ in range(3):
        gate.release(await gate.admit(Demand(1, pico(1_000_000))), None)
    assert gate.stop is None


# closing and trouble


@on_moved_clock
async def test_closing_the_gate_ends_waits() -> None:
    gate = new_gate(requests_per_minute=1)
    await gate.admit(SMALL)
    waiting = [await turns(gate.admit(SMALL)) for _ in range(5)]
    start_s = now_s()
    stop = Stop(ExitCode.SIGINT, "interrupted")
    gate.close(stop)
    ends = await asyncio.gather(*waiting, gate.admit(SMALL), return_exceptions=True)
    assert [end.stop for end in ends if isinstance(end, GateClosed)] == [stop] * 6
    assert now_s() == start_s


STORM = 10
"""So many refusals in a row are no chance."""


async def storm(gate: Gate, retry_after_s: float | None = None) -> None:
    """Everything that is sent is refused, and the gate pauses."""
    for row in range(STORM):
        slot = await gate.admit(SMALL)
        gate.observe(slot, Outcome(row, Verdict.SLOW, RATE_LIMIT, retry_after_s))
        gate.release(slot, 0)


@on_moved_clock
async def test_closing_ends_a_cooling_wait() -> None:
    gate = new_gate()
    await storm(gate, 900.0)
    waiting = await turns(gate.admit(SMALL))
    assert gate.binding.limit is Limit.COOLING
    start_s = now_s()
    gate.close(Stop(ExitCode.SIGTERM, "terminated"))
    with pytest.raises(GateClosed, match="terminated"):
        await waiting
    assert now_s() == start_s


@on_moved_clock
async def test_a_cooling_ends_with_a_probe() -> None:
    gate = new_gate()
    await storm(gate, 30.0)
    start_s = now_s()
    first, second = await turns(gate.admit(SMALL)), await turns(gate.admit(SMALL))
    until_s = gate.binding.until_s
    probe = await first
    assert until_s is not None
    assert start_s + 30 <= until_s
    assert now_s() == pytest.approx(until_s)
    await asyncio.sleep(100)
    assert (second.done(), gate.binding) == (False, Binding(Limit.PROBING))
    assert gate.observe(probe, Outcome(1, Verdict.OK)) == Decision()
    await second


@on_moved_clock
async def test_an_unsent_probe_frees_the_next() -> None:
    gate = new_gate()
    await storm(gate)
    probe = await gate.admit(SMALL)
    waiting = await turns(gate.admit(SMALL))
    gate.release(probe, 0)
    await waiting


@on_moved_clock
async def test_a_free_failure_returns_its_tokens() -> None:
    gate = new_gate(tokens_per_minute=6_000)
    slot = await gate.admit(Demand(tokens=100))
    gate.observe(slot, Outcome(0, Verdict.FREE, SERVER_ERROR))
    gate.release(slot, 0)
    start_s = now_s()
    await gate.admit(Demand(tokens=100))
    assert now_s() == start_s


@on_moved_clock
async def test_one_refusal_delays_no_other_row() -> None:
    gate = new_gate(tokens_per_minute=6_000)
    slot = await gate.admit(Demand(tokens=100))
    gate.observe(slot, Outcome(0, Verdict.SLOW, RATE_LIMIT, retry_after_s=60.0))
    gate.release(slot, 0)
    start_s = now_s()
    await gate.admit(Demand(tokens=100))
    assert now_s() == start_s


@pytest.mark.parametrize(
    ("verdict", "error"), [(Verdict.SLOW, RATE_LIMIT), (Verdict.FREE, SERVER_ERROR), (Verdict.MAYBE, None)]
)
def test_five_minutes_of_trouble_need_few_requests(verdict: Verdict, error: RowError | None) -> None:
    """Workers send fewer than thirty and then finish."""

    async def main() -> None:
        gate = new_gate(max_in_flight=64)
        well_at_s = now_s() + 300.0
        rows = list(range(500))
        sent: list[float] = []
        done: list[int] = []

        async def worker() -> None:
            while rows:
                row = rows.pop(0)
                slot = await gate.admit(SMALL)
                sent.append(now_s())
                await asyncio.sleep(0.05)
                well = now_s() > well_at_s
                gate.observe(slot, Outcome(row, Verdict.OK) if well else Outcome(row, verdict, error))
                gate.release(slot, 0)
                (done if well else rows).append(row)

        await asyncio.gather(*(worker() for _ in range(64)))
        assert sum(at_s < well_at_s for at_s in sent) < 30
        assert sorted(done) == list(range(500))
        assert gate.stop is None

    run_on_moved_clock(main())


@on_moved_clock
async def test_the_next_success_judges_a_suspect_row() -> None:
    gate = new_gate()
    suspect = await gate.admit(SMALL)
    forbidden = RowError("forbidden", 403, None, "HTTP 403")
    assert gate.observe(suspect, Outcome(7, Verdict.PAUSE, forbidden)) == Decision(hold=True)
    gate.release(suspect, 0)
    probe = await gate.admit(SMALL)
    assert gate.observe(probe, Outcome(8, Verdict.OK)) == Decision(own=(7,))
    assert gate.successes == 1


# the clock these tests live on


def test_an_endless_test_fails_instead() -> None:
    async def main() -> None:
        gate = new_gate(max_in_flight=1)
        await gate.admit(SMALL)
        await gate.admit(SMALL)

    with pytest.raises(NothingWillHappen):
        run_on_moved_clock(main())


def test_the_moved_clock_passes_hours_without_waiting() -> None:
    async def main() -> float:
        start_s = now_s()
        await asyncio.sleep(36_000)
        return now_s() - start_s

    assert run_on_moved_clock(main()) == 36_000


@on_moved_clock
async def test_a_slot_granted_to_a_cancelled_row_returns() -> None:
    """The row is cancelled between its grant and its next step; the slot and the money serve the next row."""
    gate = new_gate(max_in_flight=1, budget=money(pico(1)))
    row = Demand(1, pico(1))
    slot = await gate.admit(row)
    waiting = asyncio.create_task(gate.admit(row))
    await asyncio.sleep(0)
    gate.observe(slot, Outcome(0, Verdict.OK))
    gate.release(slot, 0)
    asyncio.get_running_loop().call_soon(waiting.cancel)  # after the queue has granted, in the same turn of the loop
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.wait_for(gate.admit(row), 1) >= 0
