"""One gate for each of several endpoints, with one queue and one budget over all of them."""

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from batchrun.errors import ExitCode
from batchrun.limits.admission import (
    OPEN,
    Binding,
    Cooling,
    Decision,
    Demand,
    Found,
    Limit,
    Open,
    Outcome,
    Phase,
    Probing,
    Stop,
    Stopped,
)
from batchrun.limits.admission_queue import UNLIMITED
from batchrun.limits.circuit import IN_FLIGHT
from batchrun.limits.gate import NO_SLOT, Gate, GateClosed
from batchrun.limits.probe_turns import InDoubt, ProbeTurns
from batchrun.limits.rates import Rates
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.records import Verdict
from batchrun.run_summary import EndpointTotals, InForce

BEST_FIRST = (Open, Probing, Cooling, Stopped)
STOPPED = Binding(Limit.STOPPED)


class Lane:
    """One endpoint: its gate, its share of the load, and why it was set aside, if it was."""

    __slots__ = ("answered", "finish", "gate", "held", "label", "sent", "set_aside", "weight")

    def __init__(self, label: str, gate: Gate, weight: float) -> None:
        self.label = label
        self.gate = gate
        self.weight = weight
        self.finish = 0.0  # virtual time at which it has done what it was given
        self.sent = self.answered = 0
        self.held: set[int] = set()
        self.set_aside: Stop | None = None


class Gates:
    """Used like a `Gate`. The first attempt in the queue goes to any endpoint that admits it now.

    If several do, they take turns by weight (start-time fair queueing), so an endpoint that was blocked for a while
    gets no more than its share afterwards. An endpoint whose circuit has stopped is set aside; the last one ends
    admission.
    """

    def __init__(
        self,
        shared: SharedAdmission,
        lanes: Sequence[Lane],
        on_set_aside: Callable[[str, Stop], None] = lambda label, stop: None,
    ) -> None:
        """The lanes' gates have consecutive slots and were made with `shared`."""
        self.shared = shared
        self.lanes = lanes
        self._on_set_aside = on_set_aside
        self._lane_of = [lane for lane in lanes for _ in range(lane.gate.slots)]
        self.slots = len(self._lane_of)
        self.stop: Stop | None = None
        self._virtual = 0.0
        self.budget = shared.budget
        self.turns: ProbeTurns = shared.turns

    @property
    def _live(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.set_aside is None]

    @property
    def in_flight(self) -> int:
        return len(self.shared.flights)

    @property
    def allowed_in_flight(self) -> int:
        return sum(lane.gate.allowed_in_flight for lane in self._live)

    @property
    def why_in_flight(self) -> str:
        return "; ".join(f"{lane.label}: {lane.gate.why_in_flight}" for lane in self._live)

    @property
    def refusals(self) -> str | None:
        """Every endpoint in trouble, and why."""
        return "; ".join(f"{lane.label}: {trouble}" for lane in self.lanes if (trouble := _trouble(lane))) or None

    @property
    def successes(self) -> int:
        return sum(lane.gate.successes for lane in self.lanes)

    @property
    def unanswered_s(self) -> float:
        return min((lane.gate.unanswered_s for lane in self._live), default=0.0)

    @property
    def phase(self) -> Phase:
        """That of the endpoint in use which is the best off."""
        phases: list[Phase] = [lane.gate.phase for lane in self._live or self.lanes]
        return min(phases, key=lambda phase: BEST_FIRST.index(type(phase)))

    @property
    def found(self) -> Found:
        """Limits found are not kept for the next start: they belong to one endpoint each."""
        return Found()

    @property
    def binding(self) -> Binding:
        if self.shared.queue:
            return self.shared.queue.blocker
        if (blocker := self.turns.blocked_by) is not None:
            return blocker
        return IN_FLIGHT if self.in_flight >= self.slots else UNLIMITED

    @property
    def in_force(self) -> InForce:
        """The sum over the endpoints in use; a rate that one of them does not limit is not limited."""
        each = [lane.gate.in_force for lane in self._live or self.lanes]
        rpm, tpm = [one.requests_per_minute for one in each], [one.tokens_per_minute for one in each]
        return msgspec.structs.replace(
            each[0],
            requests_per_minute=None if None in rpm else sum(filter(None, rpm)),
            tokens_per_minute=None if None in tpm else sum(filter(None, tpm)),
            max_in_flight=sum(one.max_in_flight for one in each),
        )

    @property
    def totals(self) -> list[EndpointTotals]:
        """What each endpoint did in this process."""
        return [
            EndpointTotals(lane.label, lane.sent, lane.answered, None if lane.set_aside is None else lane.set_aside.why)
            for lane in self.lanes
        ]

    def tune(self, rates: Rates = Rates(), *, max_in_flight: int | None = None) -> None:  # noqa: B008  (frozen)
        """Lets the queue check again after a change of the budget.

        Raises:
            ValueError: a rate or the number in flight is to change, which each endpoint has for itself.
        """
        if rates != Rates() or max_in_flight is not None:
            raise ValueError("with several endpoints only the budget can be changed; each has its limits in the job")
        self.shared.wake()

    def admit(self, demand: Demand, *, probes: bool = True) -> Coroutine[Any, Any, int]:
        """As `Gate.admit`, at any of the endpoints."""
        return self.shared.queue.admit(self._try_admit, demand, probes, self._give_back)

    def _try_admit(self, demand: Demand, probes: bool) -> int | Binding:
        """The slot at the first endpoint in turn that admits the attempt now; else the block that is lifted first."""
        if self.stop is not None:
            raise GateClosed(self.stop)
        live = self._live
        if not probes and all(lane.gate.circuit.in_doubt for lane in live):
            raise InDoubt
        blockers: list[Binding] = []
        for lane in sorted(live, key=lambda lane: max(lane.finish, self._virtual)):
            try:
                granted = lane.gate.try_admit(demand, probes=True)
            except GateClosed as closed:  # the budget, which is that of all
                self.close(closed.stop)
                raise
            if isinstance(granted, int):
                start = max(lane.finish, self._virtual)
                self._virtual, lane.finish = start, start + 1 / lane.weight
                lane.sent += 1
                return granted
            blockers.append(granted)
        return _first_lifted(blockers)

    def _give_back(self, slot: int) -> None:
        self._lane_of[slot].sent -= 1
        self.release(slot, 0, 0)

    def index_of(self, slot: int) -> int:
        """Which endpoint the slot belongs to."""
        return self.lanes.index(self._lane_of[slot])

    def bound(self, slot: int) -> tuple[int | None, int]:
        return self._lane_of[slot].gate.bound(slot)

    def settle(self, slot: int, tokens: int | None, output_tokens: int = 0) -> None:
        self._lane_of[slot].gate.settle(slot, tokens, output_tokens)

    def read_headers(self, slot: int, headers: Mapping[str, str]) -> None:
        self._lane_of[slot].gate.read_headers(slot, headers)

    def observe(self, slot: int, outcome: Outcome) -> Decision:
        """As `Gate.observe`. If this sets the endpoint aside, its rows in question are sent elsewhere."""
        lane = self._lane_of[slot]
        decision = lane.gate.observe(slot, outcome)
        lane.answered += outcome.verdict is Verdict.OK
        for each in self.lanes:
            each.held.discard(outcome.row)
        lane.held.difference_update(decision.own)
        if decision.hold:
            lane.held.add(outcome.row)
        if lane.gate.stop is None or self.stop is not None:
            return decision
        if lane.set_aside is None and self._is_last_set_aside(lane, lane.gate.stop):
            return decision
        elsewhere, lane.held = tuple(lane.held), set()
        return msgspec.structs.replace(decision, hold=False, elsewhere=elsewhere)

    def release(self, slot: int, spent_pico_usd: int | None, spent_tokens: int | None = None) -> None:
        self._lane_of[slot].gate.release(slot, spent_pico_usd, spent_tokens)

    def release_all(self, spent: Iterable[tuple[int, int | None, int | None]]) -> None:
        for slot, usd, tokens in spent:
            self._lane_of[slot].gate.put_down(slot, usd, tokens)
        self.shared.wake()

    def close(self, stop: Stop) -> None:
        """Ends admission at all endpoints. The first reason is kept."""
        if self.stop is None:
            self.stop = stop
        for lane in self.lanes:
            lane.gate.close(stop)

    def restore(self, index: int, why: str) -> bool:
        """Tries an endpoint again that was set aside, one row at a time; True if it was."""
        lane = self.lanes[index]
        if lane.set_aside is None or self.stop is not None:
            return False
        lane.set_aside = None
        lane.gate.reopen(why)
        return True

    def _is_last_set_aside(self, lane: Lane, stop: Stop) -> bool:
        """Sets the endpoint aside; True, and admission has ended, if no other is left."""
        lane.set_aside = stop
        self._on_set_aside(lane.label, stop)
        if self._live:
            return False
        stops = [each.set_aside for each in self.lanes if each.set_aside is not None]
        paused = any(each.exit_code is ExitCode.PAUSED for each in stops)
        why = "; ".join(f"{each.label}: {each.set_aside.why}" for each in self.lanes if each.set_aside is not None)
        self.close(Stop(ExitCode.PAUSED if paused else stop.exit_code, f"no endpoint is left: {why}"))
        return True


AnyGate = Gate | Gates


class Circuits:
    """The circuits of several endpoints as one: in doubt only if all are that are in use."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        """The list of lanes may be filled later: their gates are made with what they share, which includes this."""
        self._lanes = lanes

    @property
    def in_doubt(self) -> bool:
        live = [lane for lane in self._lanes if lane.set_aside is None]
        return bool(live) and all(lane.gate.circuit.in_doubt for lane in live)

    def binding(self, now_s: float) -> Binding | None:
        blockers = []
        for lane in self._lanes:
            if lane.set_aside is not None:
                continue
            if (blocker := lane.gate.circuit.binding(now_s)) is None:
                return None
            blockers.append(blocker)
        return _first_lifted(blockers)


def _first_lifted(blockers: Sequence[Binding]) -> Binding:
    timed = [blocker for blocker in blockers if blocker.until_s is not None]
    if timed:
        return min(timed, key=lambda blocker: blocker.until_s or 0.0)
    # one that more than a commit may lift comes first
    return next((blocker for blocker in blockers if blocker is not NO_SLOT), NO_SLOT if blockers else STOPPED)


def _trouble(lane: Lane) -> str | None:
    """Why the endpoint gets less than its share, in words; None if it does not."""
    if lane.set_aside is not None:
        return f"set aside, {lane.set_aside.why}"
    match lane.gate.phase:
        case Cooling(because=because):
            return f"cooling down ({because})"
        case Probing(why=why):
            return f"probing ({why})"
    return lane.gate.refusals if lane.gate.phase is OPEN else None
