"""Who chooses a row while the endpoint is in doubt, on a clock that jumps."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from batchrun.errors import ExitCode
from batchrun.limits.admission import Limit, Outcome, Stop
from batchrun.limits.gate import Gate
from batchrun.limits.probe_turns import InDoubt
from batchrun.records import Verdict
from tests.moved_clock import run_on_moved_clock
from tests.unit.test_gate import SERVER_ERROR, SMALL, new_gate


def on_moved_clock(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    def run() -> None:
        run_on_moved_clock(test())

    run.__name__ = test.__name__
    return run


async def ends(gate: Gate, row: int, verdict: Verdict, *, probes: bool = True) -> None:
    slot = await gate.admit(SMALL, probes=probes)
    gate.observe(slot, Outcome(row, verdict, None if verdict is Verdict.OK else SERVER_ERROR))
    gate.release(slot, 0)


async def trouble(gate: Gate) -> None:
    """Five rows in a row were not answered."""
    for row in range(5):
        await ends(gate, row, Verdict.FREE)


@on_moved_clock
async def test_an_open_gate_needs_no_turns() -> None:
    gate = new_gate()
    assert not any([await gate.turns.wait() for _ in range(20)])


@on_moved_clock
async def test_in_doubt_rows_choose_one_by_one() -> None:
    gate = new_gate()
    await trouble(gate)
    waiting = [asyncio.create_task(gate.turns.wait()) for _ in range(10)]
    await asyncio.sleep(0.9)
    assert not any(task.done() for task in waiting)
    assert gate.binding.limit is Limit.COOLING
    await asyncio.sleep(1)
    assert [task.result() for task in waiting if task.done()] == [True]
    slot = await gate.admit(SMALL)
    gate.turns.end()
    await asyncio.sleep(5)
    assert sum(task.done() for task in waiting) == 1
    gate.observe(slot, Outcome(1, Verdict.OK))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [task.result() for task in waiting].count(False) == 9


@on_moved_clock
async def test_a_turn_without_row_passes_on() -> None:
    gate = new_gate()
    await trouble(gate)
    first = await gate.turns.wait()
    second = asyncio.create_task(gate.turns.wait())
    await asyncio.sleep(100)
    assert not second.done()
    gate.turns.end()
    assert first
    assert await second


@on_moved_clock
async def test_queued_rows_return_when_in_doubt() -> None:
    gate = new_gate(max_in_flight=5)
    slots = [await gate.admit(SMALL) for _ in range(5)]
    line = [asyncio.create_task(gate.admit(SMALL, probes=False)) for _ in range(10)]
    await asyncio.sleep(1)
    for row, slot in enumerate(slots):
        gate.observe(slot, Outcome(row, Verdict.FREE, SERVER_ERROR))
    found = await asyncio.gather(*line, return_exceptions=True)
    assert [type(each) for each in found] == [InDoubt] * 10
    with pytest.raises(InDoubt):
        await gate.admit(SMALL, probes=False)


@on_moved_clock
async def test_a_closing_gate_holds_no_worker() -> None:
    gate = new_gate()
    await trouble(gate)
    waiting = [asyncio.create_task(gate.turns.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    gate.close(Stop(ExitCode.STOPPED, "enough"))
    assert await asyncio.gather(*waiting) == [False] * 10
