"""Admits each attempt when rates, budget, requests in flight and the endpoint's circuit all allow it."""

import math
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from batchrun.errors import ExitCode, RunStoppedError
from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import OPEN, Binding, Decision, Demand, Found, Limit, Outcome, Phase, Stop
from batchrun.limits.admission_queue import UNLIMITED
from batchrun.limits.circuit import IN_FLIGHT, Circuit
from batchrun.limits.overruns import Overruns
from batchrun.limits.probe_turns import InDoubt
from batchrun.limits.rate_headers import read_limit
from batchrun.limits.rates import RateLimits, Rates
from batchrun.limits.refusals import NOTHING, Conclusion, Refusals
from batchrun.limits.shared_admission import Flight, SharedAdmission
from batchrun.money import to_usd
from batchrun.records import OK, Verdict
from batchrun.run_summary import InForce

BUDGET = Binding(Limit.BUDGET)
NO_SLOT = Binding(Limit.IN_FLIGHT)
"""All slots are taken: only a commit helps, as no other block does."""

_MOST_RECORDED = 2**63 - 1
"""10⁻¹² USD, nine million USD: what slots and records have room for."""

SEARCHING_S = 0.05
"""While a limit is searched from far below, an accepted attempt may raise the rate before the next one is due."""

HEADERS_EVERY_S = 0.01
"""How often rate limit headers are read: often enough to know a limit's level, and cheap in a busy run."""

_TOKENS = re.compile(r"\btokens?\b|\bTPM\b", re.IGNORECASE)
_REQUESTS = re.compile(r"\brequests?\b|\bRPM\b", re.IGNORECASE)
"""Words in a 429 that name the limit (docs/api.md, "Errors": practice). It is the one on requests if none does."""


class GateClosed(RunStoppedError):
    """The gate admits no more attempts; `stop` has the reason and the exit code."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.why, stop.exit_code)
        self.stop = stop


class Gate:
    """Admits attempts, each into a slot of its own. One per event loop, not thread-safe.

    A slot's life: `admit`, then `settle` when the usage is known, `observe` with the outcome, `release` when that
    outcome is durable. An attempt that was never sent needs only `release`.
    """

    def __init__(
        self,
        circuit: Circuit,
        shared: SharedAdmission,
        rates: RateLimits,
        *,
        overruns: Overruns | None = None,
        on_cause: Callable[[str, str], None] = lambda cause, why: None,
    ) -> None:
        """Gates of several endpoints are given the same `shared`, each a circuit and rates of its own.

        `overruns` raises the upper bounds of models that were billed beyond them; without it, bounds are trusted.
        `on_cause` is called when refusals get another explanation: the cause, and what shows it.
        """
        self.circuit = circuit
        self._loop = shared.loop
        self._rates = rates
        self._requests, self._tokens = self._rates.requests, self._rates.tokens
        adaptive = {Limit.REQUESTS: self._requests, Limit.TOKENS: self._tokens}
        self._refusals = Refusals(adaptive, circuit.in_flight, on_cause)
        self._next_headers_s = self._loop.time()
        self.shared = shared
        self.budget = shared.budget
        self._overruns = overruns
        self.slots = circuit.in_flight.most  # the most that can ever be in flight, whatever limit is set later
        self._free = list(reversed(shared.new_slots(self.slots)))  # a stack: low slots are used again
        self._flights = shared.flights
        self._queue = shared.queue
        self.turns = shared.turns

    @property
    def in_flight(self) -> int:
        """Attempts that are admitted and not yet durable."""
        return self.slots - len(self._free)

    @property
    def allowed_in_flight(self) -> int:
        """How many attempts may be in flight now."""
        return self.circuit.in_flight.allowed

    @property
    def why_in_flight(self) -> str:
        """The reason for `allowed_in_flight`."""
        return self.circuit.in_flight.why

    @property
    def refusals(self) -> str | None:
        """Why requests are refused, in words; None if hardly any are."""
        return self._refusals.in_words

    @property
    def successes(self) -> int:
        """Good answers in this process; see `Circuit`."""
        return self.circuit.successes

    @property
    def unanswered_s(self) -> float:
        """Seconds since the endpoint answered last, if it has failed since; else 0."""
        return self.circuit.unanswered_s(self._loop.time())

    @property
    def stop(self) -> Stop | None:
        """Why the gate is closed; None while it is open."""
        return self.circuit.stop

    @property
    def found(self) -> Found:
        """Limits found from headers or refusals that are lower than the configured ones."""
        return Found(self._found(self._requests), self._found(self._tokens))

    @property
    def binding(self) -> Binding:
        """What the next attempt waits for; `latency` if nothing but the endpoint's answers."""
        if self._queue:
            return self._queue.blocker
        if (blocker := self.turns.blocked_by) is not None:
            return blocker
        return IN_FLIGHT if self.in_flight >= self.circuit.in_flight.most else UNLIMITED

    def tune(self, rates: Rates = Rates(), *, max_in_flight: int | None = None) -> None:  # noqa: B008  (frozen)
        """Changes the limits; None leaves one as it is. Attempts in flight are not affected.

        `max_in_flight` can't exceed its value at the start, because no more slots exist. A lower one takes effect as
        attempts end.
        """
        self._rates.tune(rates, self._loop.time())
        if rates.requests_per_minute is not None:
            self._refusals.searches[Limit.REQUESTS].forget()
        if rates.tokens_per_minute is not None:
            self._refusals.searches[Limit.TOKENS].forget()
        if max_in_flight is not None:
            self.circuit.in_flight.limit(min(max_in_flight, self.slots))
        self.shared.wake()

    @property
    def in_force(self) -> InForce:
        """The limits in force now."""
        caps = self.budget
        return InForce(
            requests_per_minute=self._requests.per_minute,
            tokens_per_minute=self._tokens.per_minute,
            max_in_flight=self.circuit.in_flight.most,
            max_cost_usd=None if caps.cost is None else to_usd(caps.cost.most),
            max_tokens=None if caps.tokens is None else caps.tokens.most,
            max_requests=None if caps.requests is None else caps.requests.most,
            requests_per_second=self._rates.requests_per_second,
            requests_per_day=None if self._rates.daily is None else self._rates.daily.limit,
            input_tokens_per_minute=self._rates.token_limit(Limit.INPUT_TOKENS),
            output_tokens_per_minute=self._rates.token_limit(Limit.OUTPUT_TOKENS),
        )

    def admit(self, demand: Demand, *, probes: bool = True) -> Coroutine[Any, Any, int]:
        """Waits its turn, takes everything the attempt needs, and returns its slot, in [0, max_in_flight).

        `probes`: whether this attempt may be sent while the endpoint is in doubt.

        Raises:
            GateClosed: nothing is admitted any more, or the budget can never cover this attempt.
            InDoubt: the endpoint is in doubt and `probes` is false.
        """
        return self._queue.admit(self.try_admit, demand, probes, self._give_back)

    def bound(self, slot: int) -> tuple[int | None, int]:
        """The attempt's reserved upper bounds, as they are recorded: cost in 10⁻¹² USD (None: unknown) and tokens."""
        demand = self._flights[slot].demand
        bound = demand.upper_bound_pico_usd
        return None if bound is None else min(bound, _MOST_RECORDED), demand.upper_bound_tokens

    def settle(self, slot: int, tokens: int | None, output_tokens: int = 0) -> None:
        """Corrects the token buckets to the usage: `tokens` in all, `output_tokens` of them for the answer.

        None (usage unknown) keeps the estimate.
        """
        flight = self._flights[slot]
        assert not flight.settled, f"slot {slot} is settled twice"
        flight.settled = True
        if tokens is not None:
            self._rates.correct(flight.demand, tokens, output_tokens)
            self._refusals.correct(tokens - flight.demand.tokens)
            if self._queue.blocker is not NO_SLOT and self._rates.limit_tokens:
                self.shared.wake()

    def read_headers(self, slot: int, headers: Mapping[str, str]) -> None:
        """Reads the rate limit headers of a response. Call it after `settle`: the headers count this usage already."""
        now_s = self._loop.time()
        if now_s < self._next_headers_s and "retry-after" not in headers:
            return
        self._next_headers_s = now_s + HEADERS_EVERY_S
        flight = self._flights[slot]
        if (limit := read_limit(headers, "requests")) is not None:
            flight.drained = limit.remaining is not None and limit.remaining < 1
            self._requests.apply_headers(limit, now_s, sent_s=flight.sent_s, sent_total=flight.requests_before)
        if (limit := read_limit(headers, "tokens")) is not None:
            flight.drained |= limit.remaining is not None and limit.remaining < flight.demand.tokens
            self._tokens.apply_headers(limit, now_s, sent_s=flight.sent_s, sent_total=flight.tokens_before)

    def observe(self, slot: int, outcome: Outcome) -> Decision:
        """Records how the attempt ended; returns what that means for its row and for rows held earlier."""
        circuit, now_s = self.circuit, self._loop.time()
        flight, was_open = self._flights[slot], circuit.phase is OPEN
        assert not flight.observed, f"slot {slot} is observed twice"
        flight.observed = True
        if self._overruns is not None:
            self._overruns.ended(flight.demand.model, outcome.verdict)
        if outcome.verdict is OK:
            # it shows how fast the endpoint is with so many in flight, and that it accepted the attempt
            in_flight, latency_s = circuit.in_flight, now_s - flight.sent_s
            free = self._requests.learned is None and in_flight.crowding.cap is None
            in_flight.knee.answered(now_s, latency_s, flight.others, in_flight.allowed, in_flight.most, free=free)
            self._refusals.ended(flight.order, now_s)
            conclusion = NOTHING
        else:
            conclusion = self._adjust_limits(flight, outcome, now_s)
        decision = circuit.observe(outcome, flight.order, now_s, conclusion)
        if not was_open and circuit.phase is OPEN:
            self._refusals.reopened(now_s)
        if self._queue.blocker is not NO_SLOT or circuit.phase is not OPEN or not was_open:
            self.shared.wake()
        return decision

    def release(self, slot: int, spent_pico_usd: int | None, spent_tokens: int | None = None) -> None:
        """Frees the slot of a durable outcome and spends its budget; None spends the whole reservation."""
        self.release_all([(slot, spent_pico_usd, spent_tokens)])

    def release_all(self, spent: Iterable[tuple[int, int | None, int | None]]) -> None:
        """As `release`, for all outcomes of a commit: slot, 10⁻¹² USD, tokens. Those that wait are granted together."""
        for slot, usd, tokens in spent:
            self.put_down(slot, usd, tokens)
        self.shared.wake()

    def put_down(self, slot: int, spent_pico_usd: int | None, spent_tokens: int | None) -> None:
        """As `release`, but nothing that waits is granted yet."""
        flight = self._flights.pop(slot)
        if not flight.observed:
            self.circuit.withdraw(flight.order)
            self._refusals.ended(flight.order, self._loop.time(), reached=False)
        if self.budget.is_kept:
            self.budget.settle(flight.demand, spent_pico_usd, spent_tokens, flight.lease)
        self._free.append(slot)

    @property
    def phase(self) -> Phase:
        """The circuit's phase."""
        return self.circuit.phase

    def reopen(self, why: str) -> None:
        """Admits one row again after a stop, to find out whether its cause is gone."""
        self.circuit.reopen(why)
        self.shared.wake()

    def close(self, stop: Stop) -> None:
        """Ends admission: waiting and later attempts get `GateClosed`. The first reason is kept."""
        self.circuit.close(stop)
        self.shared.wake()

    def _adjust_limits(self, flight: Flight, outcome: Outcome, now_s: float) -> Conclusion:
        """Updates rates and requests in flight after a failure. A refused attempt used nothing, so it is given back to
        the buckets, unless the rate was itself learned from refusals: then it would be sent and refused again at once.
        """
        if outcome.verdict is Verdict.FREE and not flight.settled:
            self._rates.correct(flight.demand, 0, 0)  # the model did not run, so no tokens were used
        if outcome.verdict is Verdict.SLOW and outcome.says_nothing:
            self._refusals.ended(flight.order, now_s, reached=False)
            return NOTHING
        if outcome.verdict is not Verdict.SLOW:
            reached = outcome.verdict is not Verdict.FREE or (
                outcome.error is not None and outcome.error.http_status is not None
            )
            self._refusals.ended(flight.order, now_s, reached=reached)
            return NOTHING
        if self._requests.learned is None:
            self._requests.settle(-1)
        if self._tokens.learned is None and not flight.settled:
            self._rates.correct(flight.demand, 0, 0)
        message = "" if outcome.error is None else outcome.error.message or ""
        names_tokens = _TOKENS.search(message) is not None and _REQUESTS.search(message) is None
        limit = Limit.TOKENS if names_tokens else Limit.REQUESTS
        names_time = outcome.retry_after_s is not None
        return self._refusals.refused(flight.order, now_s, limit, names_time=names_time, empty=flight.drained)

    def _found(self, rate: AdaptiveRate) -> float | None:
        """The found limit if it is lower than the configured one. One that may be chance does not count."""
        rates = [rate.stated_now, None if rate.learned is None else self._refusals.searches[rate.limit].confirmed]
        known = min((rate for rate in rates if rate is not None), default=None)
        return None if known is None or (rate.configured is not None and known >= rate.configured) else known

    def try_admit(self, demand: Demand, probes: bool) -> int | Binding:
        """Takes everything the attempt needs and returns its slot, or takes nothing and returns what blocks it.

        Raises as `admit` does.
        """
        circuit, now_s = self.circuit, self._loop.time()
        if circuit.phase is not OPEN or circuit.out >= circuit.in_flight.allowed:
            blocker = circuit.binding(now_s) if circuit.phase is OPEN else self._blocked_by_circuit(probes, now_s)
            if blocker is not None:
                return blocker
        if len(self._free) <= self.slots - circuit.in_flight.most:  # all, or all but those beyond a lower limit
            return NO_SLOT
        if self._overruns is not None:
            demand = self._overruns.widened(demand)  # an answer may have shown an overrun while the attempt waited
        if self.budget.is_kept and (blocker := self._blocked_by_budget(demand)) is not None:
            return blocker
        self._refusals.rise(now_s)
        if (blocker := self._rates.blocked_by(demand, now_s)) is not None:
            if self._refusals.is_searching:
                return Binding(blocker.limit, min(blocker.until_s or math.inf, now_s + SEARCHING_S))
            return blocker
        lease = self.budget.reserve(demand) if self.budget.is_kept else None
        slot, order = self._free.pop(), circuit.admit(now_s)
        requests, tokens = self._requests.taken, self._tokens.taken
        self._flights[slot] = Flight(demand, order, now_s, self._refusals.out, requests, tokens, lease)
        self._rates.take(demand, now_s)
        self._refusals.sent(now_s, demand.tokens)
        return slot

    def _blocked_by_circuit(self, probes: bool, now_s: float) -> Binding | None:
        """What an endpoint in trouble blocks the attempt by, which may end a pause.

        Raises as `admit` does.
        """
        circuit = self.circuit
        if not probes and circuit.in_doubt:
            raise InDoubt
        if circuit.stop is not None:
            raise GateClosed(circuit.stop)
        blocker = circuit.binding(now_s)
        if blocker is None and circuit.phase is OPEN:
            self._refusals.reopened(now_s)  # after a pause all are sent at once, at a lower rate
        return blocker

    def _blocked_by_budget(self, demand: Demand) -> Binding | None:
        if not self.budget.fits(demand):
            if self._flights or self.budget.may_come(demand):
                return BUDGET  # what is in flight, here or in other runs, may return a part of its reservation
            stop = Stop(ExitCode.STOPPED, self.budget.refusal(demand))
            self.circuit.close(stop)
            raise GateClosed(stop)
        if self._overruns is None or not self.budget.rests_on_bounds:
            return None
        if (most := self._overruns.most_in_flight(demand.model)) is None:
            return None
        out = sum(flight.demand.model == demand.model and not flight.observed for flight in self._flights.values())
        return None if out < most else BUDGET  # the first answer of this model will show whether its bounds hold

    def _give_back(self, slot: int) -> None:
        """The attempt was never sent."""
        self.release(slot, 0, 0)
