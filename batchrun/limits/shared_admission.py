"""The attempts in flight, and what all gates of a run share: one for each endpoint, of which most runs have one."""

import asyncio

import msgspec

from batchrun.limits.admission import Demand
from batchrun.limits.admission_queue import AdmissionQueue
from batchrun.limits.budget import BudgetAccount, Settleable
from batchrun.limits.probe_turns import Breaker, ProbeTurns


class Flight(msgspec.Struct):
    """One admitted attempt, until its outcome is durable."""

    demand: Demand
    order: int
    sent_s: float
    others: int
    requests_before: float
    tokens_before: float
    lease: Settleable | None
    drained: bool = False
    """The response's headers show a bucket without room for this attempt."""
    observed: bool = False
    settled: bool = False


class SharedAdmission:
    """What gates with one backlog share: the queue, probing turns, budget, slots, and the attempts in flight by slot.

    The event loop's clock is the gates' clock, as it is aiolimiter's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, circuit: Breaker, budget: BudgetAccount | None = None) -> None:
        self.loop = loop
        self._slots = 0
        self.queue = AdmissionQueue(loop)
        self.turns = ProbeTurns(circuit, loop)
        self.budget = budget or BudgetAccount()
        self.flights: dict[int, Flight] = {}

    def new_slots(self, count: int) -> range:
        """So many slots for one gate: consecutive numbers, from 0 for the first gate."""
        first, self._slots = self._slots, self._slots + count
        return range(first, self._slots)

    def wake(self) -> None:
        """Waiting attempts and workers check again."""
        self.queue.wake()
        self.turns.wake()
