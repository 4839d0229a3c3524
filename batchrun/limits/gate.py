"""Admits each attempt when rates, budget, requests in flight and the endpoint's circuit all allow it."""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping
from decimal import Decimal

import msgspec

from batchrun.errors import ExitCode, RunStoppedError
from batchrun.job.job import Limits
from batchrun.limits.adaptive_rate import AdaptiveRate, RateChange
from batchrun.limits.admission import OPEN, Ask, Binding, Found, Limit, Outcome, Ruling, Stop
from batchrun.limits.budget import BudgetAccount
from batchrun.limits.circuit import IN_FLIGHT, Circuit
from batchrun.limits.daily import DailyCount
from batchrun.limits.overruns import Overruns
from batchrun.limits.probe_turns import InDoubt, ProbeTurns
from batchrun.limits.rate_headers import read_limit
from batchrun.limits.rates import RateLimits, Rates
from batchrun.limits.refusals import NOTHING, Finding, Refusals
from batchrun.records import InForce, Verdict

TIMER_GRAIN_S = 0.001
"""Event loops count in milliseconds: a shorter timer, for a wait of a float's rounding error, would spin."""

UNLIMITED = Binding(Limit.LATENCY)
BUDGET = Binding(Limit.BUDGET)

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


class _Flight(msgspec.Struct):
    """One admitted attempt, until its outcome is durable."""

    ask: Ask
    order: int
    sent_s: float
    others: int
    requests_before: float
    tokens_before: float
    drained: bool = False
    """The response's headers show a bucket without room for this attempt."""
    observed: bool = False
    settled: bool = False


class Gate:
    """Admits attempts, each into a slot of its own. One per event loop, not thread-safe.

    A slot's life: `admit`, then `settle` when the usage is known, `observe` with the outcome, `release` when that
    outcome is durable. An attempt that was never sent needs only `release`.
    """

    def __init__(
        self,
        circuit: Circuit,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        *,
        daily: DailyCount | None = None,
        found: Found = Found(),  # noqa: B008  (frozen)
        purse: BudgetAccount | None = None,
        overruns: Overruns | None = None,
        on_pace: RateChange = lambda limit, before, after, why: None,
        on_kind: Callable[[str, str], None] = lambda kind, why: None,
    ) -> None:
        """The event loop's clock is the gate's clock, as it is aiolimiter's.

        `overruns` raises the upper bounds of models that were billed beyond them; without it, bounds are trusted.
        `found` holds the limits that an earlier process found. `on_pace` is called for each change of a limit,
        `on_kind` when refusals get another explanation.
        """
        self._circuit = circuit
        self._loop = loop
        self._rates = RateLimits(limits, loop.time(), daily=daily, found=found, on_pace=on_pace)
        self._requests, self._tokens = self._rates.requests, self._rates.tokens
        rates = {Limit.REQUESTS: self._requests, Limit.TOKENS: self._tokens}
        self._refusals = Refusals(rates, circuit.in_flight, on_kind)
        self._next_headers_s = loop.time()
        self.purse = purse or BudgetAccount()
        self._overruns = overruns
        self._slots = circuit.in_flight.most
        self._free = list(range(self._slots - 1, -1, -1))  # a stack, so that low slots are used again
        self._flights: dict[int, _Flight] = {}
        self._queue: deque[asyncio.Future[None]] = deque()  # FIFO: small requests never starve a large one
        self.turns = ProbeTurns(circuit, loop)
        self._timer: asyncio.TimerHandle | None = None
        self._blocker = UNLIMITED

    @property
    def slots(self) -> int:
        """The most attempts that can ever be in flight, whatever limit is set later."""
        return self._slots

    @property
    def in_flight(self) -> int:
        """Attempts that are admitted and not yet durable."""
        return len(self._flights)

    @property
    def allowed_in_flight(self) -> int:
        """How many attempts may be in flight now."""
        return self._circuit.in_flight.allowed

    @property
    def why_in_flight(self) -> str:
        """The reason for `allowed_in_flight`."""
        return self._circuit.in_flight.why

    @property
    def refusals(self) -> str | None:
        """Why requests are refused, in words; None if hardly any are."""
        return self._refusals.in_words

    @property
    def successes(self) -> int:
        """Good answers in this process; see `Circuit`."""
        return self._circuit.successes

    @property
    def unanswered_s(self) -> float:
        """Seconds since the endpoint answered last, if it has failed since; else 0."""
        return self._circuit.unanswered_s(self._loop.time())

    @property
    def stop(self) -> Stop | None:
        """Why the gate is closed; None while it is open."""
        return self._circuit.stop

    @property
    def found(self) -> Found:
        """Limits found from headers or refusals that are lower than the configured ones."""
        return Found(self._found(self._requests), self._found(self._tokens))

    @property
    def binding(self) -> Binding:
        """What the next attempt waits for; `latency` if nothing but the endpoint's answers."""
        if self._queue:
            return self._blocker
        if (blocker := self.turns.blocked_by) is not None:
            return blocker
        return IN_FLIGHT if len(self._flights) >= self._circuit.in_flight.most else UNLIMITED

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
            self._circuit.in_flight.limit(min(max_in_flight, self._slots))
        self._wake_first()

    @property
    def in_force(self) -> InForce:
        """The limits in force now."""
        caps = self.purse
        return InForce(
            requests_per_minute=self._requests.per_minute,
            tokens_per_minute=self._tokens.per_minute,
            max_in_flight=self._circuit.in_flight.most,
            max_cost_usd=None if caps.cost_usd is None else caps.cost_usd.most,
            max_tokens=None if caps.tokens is None else caps.tokens.most,
            max_requests=None if caps.requests is None else caps.requests.most,
            requests_per_second=self._rates.requests_per_second,
            requests_per_day=None if self._rates.daily is None else self._rates.daily.limit,
            input_tokens_per_minute=self._rates.token_limit(Limit.INPUT_TOKENS),
            output_tokens_per_minute=self._rates.token_limit(Limit.OUTPUT_TOKENS),
        )

    async def admit(self, ask: Ask, *, probes: bool = True) -> int:
        """Waits its turn, takes everything the attempt needs, and returns its slot, in [0, max_in_flight).

        `probes`: whether this attempt may be sent while the endpoint is in doubt.

        Raises:
            GateClosed: nothing is admitted any more, or the budget can never cover this attempt.
            InDoubt: the endpoint is in doubt and `probes` is false.
        """
        if self._queue or self._blocked_by(ask, probes=probes) is not None:
            await self._wait_in_queue(ask, probes=probes)
        await self._rates.acquire()  # never suspends right after `_blocked_by`, so all is taken at once
        return self._take(ask)

    def bound(self, slot: int) -> tuple[Decimal | None, int]:
        """The attempt's reserved upper bounds: cost in USD (None: unknown) and tokens."""
        ask = self._flights[slot].ask
        return ask.upper_bound_usd, ask.upper_bound_tokens

    def settle(self, slot: int, tokens: int | None, output_tokens: int = 0) -> None:
        """Corrects the token buckets to the usage: `tokens` in all, `output_tokens` of them for the answer.

        None (usage unknown) keeps the estimate.
        """
        flight = self._flights[slot]
        assert not flight.settled, f"slot {slot} is settled twice"
        flight.settled = True
        if tokens is not None:
            self._rates.correct(flight.ask, tokens, output_tokens)
            self._refusals.correct(tokens - flight.ask.tokens)
            self._wake_first()

    def hear(self, slot: int, headers: Mapping[str, str]) -> None:
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
            flight.drained |= limit.remaining is not None and limit.remaining < flight.ask.tokens
            self._tokens.apply_headers(limit, now_s, sent_s=flight.sent_s, sent_total=flight.tokens_before)

    def observe(self, slot: int, outcome: Outcome) -> Ruling:
        """Records how the attempt ended; returns what that means for its row and for rows held earlier."""
        flight = self._flights[slot]
        assert not flight.observed, f"slot {slot} is observed twice"
        flight.observed = True
        if self._overruns is not None and self._overruns.most_in_flight(flight.ask.model) is not None:
            self._overruns.ended(flight.ask.model, outcome.verdict)
        was_open, now_s = self._circuit.phase is OPEN, self._loop.time()
        finding = self._adjust_limits(flight, outcome, now_s)
        ruling = self._circuit.observe(outcome, flight.order, now_s, finding)
        if not was_open and self._circuit.phase is OPEN:
            self._refusals.reopened(now_s)
        self._wake_first()
        return ruling

    def release(self, slot: int, spent_usd: Decimal | None, spent_tokens: int | None = None) -> None:
        """Frees the slot of a durable outcome and spends its budget; None spends the whole reservation."""
        flight = self._flights.pop(slot)
        if not flight.observed:
            self._circuit.withdraw(flight.order)
            self._refusals.ended(flight.order, self._loop.time(), reached=False)
        self.purse.settle(flight.ask, spent_usd, spent_tokens)
        self._free.append(slot)
        self._wake_first()

    def close(self, stop: Stop) -> None:
        """Ends admission: waiting and later attempts get `GateClosed`. The first reason is kept."""
        self._circuit.close(stop)
        self._wake_first()

    def _adjust_limits(self, flight: _Flight, outcome: Outcome, now_s: float) -> Finding:
        """Updates rates and requests in flight. A refused attempt used nothing, so it is given back to the buckets,
        unless the rate was itself learned from refusals: then it would be sent and refused again at once.
        """
        if outcome.verdict is Verdict.FREE and not flight.settled:
            self._rates.correct(flight.ask, 0, 0)  # the model did not run, so no tokens were used
        if outcome.verdict is Verdict.SLOW and outcome.says_nothing:
            self._refusals.ended(flight.order, now_s, reached=False)
            return NOTHING
        if outcome.verdict is not Verdict.SLOW:
            reached = outcome.verdict is not Verdict.FREE or (
                outcome.error is not None and outcome.error.http_status is not None
            )
            if outcome.verdict is Verdict.OK:
                self._circuit.in_flight.knee.answered(
                    now_s,
                    now_s - flight.sent_s,
                    flight.others,
                    self._circuit.in_flight.allowed,
                    self._circuit.in_flight.most,
                    free=self._requests.learned is None and self._circuit.in_flight.crowding.cap is None,
                )
            self._refusals.ended(flight.order, now_s, reached=reached)
            return NOTHING
        if self._requests.learned is None:
            self._requests.settle(-1)
        if self._tokens.learned is None and not flight.settled:
            self._rates.correct(flight.ask, 0, 0)
        message = "" if outcome.error is None else outcome.error.message or ""
        limit = Limit.TOKENS if _names_tokens(message) else Limit.REQUESTS
        names_time = outcome.retry_after_s is not None
        return self._refusals.refused(flight.order, now_s, limit, names_time=names_time, empty=flight.drained)

    def _found(self, rate: AdaptiveRate) -> float | None:
        """The found limit if it is lower than the configured one. One that may be chance does not count."""
        rates = [rate.stated_now, None if rate.learned is None else self._refusals.searches[rate.limit].confirmed]
        known = min((rate for rate in rates if rate is not None), default=None)
        return None if known is None or (rate.configured is not None and known >= rate.configured) else known

    async def _wait_in_queue(self, ask: Ask, *, probes: bool) -> None:
        """Returns when this attempt is first in the queue and nothing blocks it. The next one runs after it took."""
        queue = self._queue
        turn = self._loop.create_future()
        queue.append(turn)
        try:
            if queue[0] is not turn:
                await turn
            while (blocker := self._blocked_by(ask, probes=probes)) is not None:
                queue[0] = turn = self._loop.create_future()
                self._set_timer(blocker)
                await turn
        finally:
            queue.remove(turn)
            self._wake_first()

    def _blocked_by(self, ask: Ask, *, probes: bool) -> Binding | None:
        """What blocks this attempt, first in the queue; None when it may go. Takes nothing."""
        if not probes and self._circuit.in_doubt:
            raise InDoubt
        if self._circuit.stop is not None:
            raise GateClosed(self._circuit.stop)
        now_s = self._loop.time()
        was_open = self._circuit.phase is OPEN
        if (blocker := self._circuit.binding(now_s)) is not None:
            return blocker
        if not was_open and self._circuit.phase is OPEN:
            self._refusals.reopened(now_s)  # after a pause all are sent at once, at a lower rate
        if len(self._flights) >= self._circuit.in_flight.most:
            return IN_FLIGHT
        if self.purse.is_kept and (blocker := self._blocked_by_budget(self._widened(ask))) is not None:
            return blocker
        self._refusals.rise(now_s)
        return self._rates.blocked_by(ask, now_s)

    def _widened(self, ask: Ask) -> Ask:
        """With the upper bounds known now: an answer may have shown an overrun while the attempt waited."""
        return ask if self._overruns is None else self._overruns.widened(ask)

    def _blocked_by_budget(self, ask: Ask) -> Binding | None:
        if not self.purse.fits(ask):
            if self._flights:
                return BUDGET  # what is in flight may return a part of its reservation
            stop = Stop(ExitCode.STOPPED, self.purse.refusal(ask))
            self._circuit.close(stop)
            raise GateClosed(stop)
        if self._overruns is None or not self.purse.rests_on_bounds:
            return None
        most = self._overruns.most_in_flight(ask.model)
        if most is None or sum(f.ask.model == ask.model and not f.observed for f in self._flights.values()) < most:
            return None
        return BUDGET  # the first answer of this model will show whether its bounds hold

    def _take(self, ask: Ask) -> int:
        ask = self._widened(ask)
        now_s = self._loop.time()
        before = self._requests.taken, self._tokens.taken
        self._rates.take(ask, now_s)
        self.purse.reserve(ask)
        slot = self._free.pop()
        others = self._refusals.out
        self._refusals.sent(now_s, ask.tokens)
        self._flights[slot] = _Flight(ask, self._circuit.admit(now_s), now_s, others, *before)
        return slot

    def _set_timer(self, blocker: Binding) -> None:
        """Sets a timer if time alone lifts the block; anything else wakes the queue when it is given back."""
        self._blocker = blocker
        if blocker.until_s is not None:
            at_s = max(blocker.until_s, self._loop.time() + TIMER_GRAIN_S)
            self._timer = self._loop.call_at(at_s, self._wake_first)

    def _wake_first(self) -> None:
        """The first in the queue checks again; its timer is cancelled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue and not self._queue[0].done():
            self._queue[0].set_result(None)
        self.turns.wake()


def _names_tokens(message: str) -> bool:
    return _TOKENS.search(message) is not None and _REQUESTS.search(message) is None
