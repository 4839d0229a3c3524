"""The gate: one line in which every attempt waits for all that it needs, and takes it all at once.

Workers stand in one FIFO. The first in it takes pace, tokens, money and a slot together or waits for what it lacks;
nobody overtakes, so a large prompt keeps its turn. Waiting is one timer for the first in line, and a wake-up
whenever something is given back. Whether the endpoint may be asked at all is `Circuit`'s to say.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping
from decimal import Decimal

import msgspec

from batchrun.errors import ExitCode, RunStoppedError
from batchrun.job.job import Limits
from batchrun.limits.adaptive_rate import AdaptiveRate, PaceChange
from batchrun.limits.admission import OPEN, Ask, Binding, Found, Limit, Outcome, Ruling, Stop
from batchrun.limits.budget import BudgetAccount
from batchrun.limits.circuit import IN_FLIGHT, Circuit
from batchrun.limits.daily import DailyCount
from batchrun.limits.overruns import Overruns
from batchrun.limits.probe_turns import InDoubt, ProbeTurns
from batchrun.limits.rate_headers import stated
from batchrun.limits.rates import RateLimits, Rates
from batchrun.limits.refusals import NOTHING, Finding, Refusals
from batchrun.records import InForce, Verdict

TIMER_GRAIN_S = 0.001
"""No timer is shorter: event loops count in milliseconds, and a wait of a float's rounding error would spin."""

UNLIMITED = Binding(Limit.LATENCY)
BUDGET = Binding(Limit.BUDGET)

HEAR_EVERY_S = 0.01
"""Headers are read no more often: a limit's level is known well enough, and a busy run saves the microseconds."""

_TOKENS = re.compile(r"\btokens?\b|\bTPM\b", re.IGNORECASE)
_REQUESTS = re.compile(r"\brequests?\b|\bRPM\b", re.IGNORECASE)
"""Words in a 429 that tell which limit it was (docs/api.md, "Errors": practice). Requests where nothing tells."""


class GateClosed(RunStoppedError):
    """Nothing is admitted any more; `stop` says why and with which exit code."""

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
    """Its answer's headers show a bucket that has no room for it."""
    observed: bool = False
    settled: bool = False


class Gate:
    """Admits attempts, each into a slot of its own, within every limit at once. One per event loop, not thread-safe.

    A slot's life: `admit`, then `settle` when the usage is known, `observe` with the outcome, `release` when that
    outcome is durable. `release` alone is enough for an attempt that was never sent.
    """

    def __init__(
        self,
        state: Circuit,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        *,
        daily: DailyCount | None = None,
        found: Found = Found(),  # noqa: B008  (frozen)
        purse: BudgetAccount | None = None,
        overruns: Overruns | None = None,
        on_pace: PaceChange = lambda limit, before, after, why: None,
        on_kind: Callable[[str, str], None] = lambda kind, why: None,
    ) -> None:
        """The loop is the clock, as it is aiolimiter's. A rate that `limits` does not tell costs nothing per call.

        `overruns` widen the bounds of what is asked; without them, bounds are believed.

        `found` is where a pace begins that no one tells; `on_pace` is told each change of a limit, `on_kind` what
        refusals are taken for.
        """
        self._state = state
        self._loop = loop
        self._rates = RateLimits(limits, loop.time(), daily=daily, found=found, on_pace=on_pace)
        self._requests, self._tokens = self._rates.requests, self._rates.tokens
        paces = {Limit.REQUESTS: self._requests, Limit.TOKENS: self._tokens}
        self._refusals = Refusals(paces, state.in_flight, on_kind)
        self._hear_s = loop.time()
        self.purse = purse or BudgetAccount()  # without caps it keeps none
        self._overruns = overruns
        self._slots = state.in_flight.most
        self._free = list(range(self._slots - 1, -1, -1))  # a stack: low slots are the ones used again
        self._flights: dict[int, _Flight] = {}
        self._line: deque[asyncio.Future[None]] = deque()
        self.turns = ProbeTurns(state, loop)
        self._timer: asyncio.TimerHandle | None = None
        self._lacking = UNLIMITED

    @property
    def slots(self) -> int:
        """How many attempts can be in flight at most, whatever limit is set later."""
        return self._slots

    @property
    def in_flight(self) -> int:
        """Attempts admitted and not yet durable."""
        return len(self._flights)

    @property
    def allowed_in_flight(self) -> int:
        """How many attempts the ramp lets be out at once."""
        return self._state.in_flight.allowed

    @property
    def why_in_flight(self) -> str:
        """Why it is so many."""
        return self._state.in_flight.why

    @property
    def refusals(self) -> str | None:
        """What refusals are taken for, in words; None where hardly anything is refused."""
        return self._refusals.in_words

    @property
    def successes(self) -> int:
        """Good answers so far in this process; see `Circuit`."""
        return self._state.successes

    @property
    def unanswered_s(self) -> float:
        """How long the endpoint has failed without an answer between."""
        return self._state.unanswered_s(self._loop.time())

    @property
    def stop(self) -> Stop | None:
        """Why the gate is closed; None while it is not."""
        return self._state.stop

    @property
    def found(self) -> Found:
        """The limits that were found where none were told; None where none was."""
        return Found(self._found(self._requests), self._found(self._tokens))

    @property
    def binding(self) -> Binding:
        """What the first in line waits for. Nobody waits where all that can be in flight is; else it is `latency`."""
        if self._line:
            return self._lacking
        if (barred := self.turns.barred) is not None:
            return barred
        return IN_FLIGHT if len(self._flights) >= self._state.in_flight.most else UNLIMITED

    def tune(self, rates: Rates = Rates(), *, max_in_flight: int | None = None) -> None:  # noqa: B008  (frozen)
        """Other limits hold from now on; None leaves one as it is. What is in flight stays so.

        More in flight than at the start is never allowed, as there are no slots for them; fewer takes effect as slots
        return.
        """
        self._rates.tune(rates, self._loop.time())
        if rates.requests_per_minute is not None:
            self._refusals.searches[Limit.REQUESTS].forget()
        if rates.tokens_per_minute is not None:
            self._refusals.searches[Limit.TOKENS].forget()
        if max_in_flight is not None:
            self._state.in_flight.limit(min(max_in_flight, self._slots))
        self._wake_first()

    @property
    def in_force(self) -> InForce:
        """The limits that hold now."""
        caps = self.purse
        return InForce(
            requests_per_minute=self._requests.per_minute,
            tokens_per_minute=self._tokens.per_minute,
            max_in_flight=self._state.in_flight.most,
            max_cost_usd=None if caps.cost_usd is None else caps.cost_usd.most,
            max_tokens=None if caps.tokens is None else caps.tokens.most,
            max_requests=None if caps.requests is None else caps.requests.most,
            requests_per_second=self._rates.requests_per_second,
            requests_per_day=None if self._rates.daily is None else self._rates.daily.limit,
            input_tokens_per_minute=self._rates.told(Limit.INPUT_TOKENS),
            output_tokens_per_minute=self._rates.told(Limit.OUTPUT_TOKENS),
        )

    async def admit(self, ask: Ask, *, probes: bool = True) -> int:
        """The slot this attempt has, in [0, max_in_flight), with all it asked for taken; waits for its turn.

        `probes`: it may go, and is waited with, while the endpoint is in doubt.

        Raises:
            GateClosed: nothing is admitted any more, or the budget can never hold this request.
            InDoubt: it may not, and the endpoint is.
        """
        if self._line or self._lacks(ask, probes=probes) is not None:
            await self._stand_in_line(ask, probes=probes)
        await self._rates.acquire()  # never suspends: _lack has just seen the capacity, so all is taken as one
        return self._take(ask)

    def bound(self, slot: int) -> tuple[Decimal | None, int]:
        """The most that the attempt in this slot may cost (USD; None: unknown) and use (tokens), as it is reserved."""
        ask = self._flights[slot].ask
        return ask.upper_bound_usd, ask.upper_bound_tokens

    def settle(self, slot: int, tokens: int | None, output_tokens: int = 0) -> None:
        """The buckets stand as if `tokens` had been asked for, `output_tokens` of them for the answer; None, no usage
        known, leaves the estimate.
        """
        flight = self._flights[slot]
        assert not flight.settled, f"slot {slot} is settled twice"
        flight.settled = True
        if tokens is not None:
            self._rates.correct(flight.ask, tokens, output_tokens)
            self._refusals.correct(tokens - flight.ask.tokens)
            self._wake_first()

    def hear(self, slot: int, headers: Mapping[str, str]) -> None:
        """What an answer's headers say of the limits is heeded. After `settle`, which they know of already."""
        now_s = self._loop.time()
        if now_s < self._hear_s and "retry-after" not in headers:
            return
        self._hear_s = now_s + HEAR_EVERY_S
        flight = self._flights[slot]
        if (said := stated(headers, "requests")) is not None:
            flight.drained = said.remaining is not None and said.remaining < 1
            self._requests.hear(said, now_s, sent_s=flight.sent_s, sent_total=flight.requests_before)
        if (said := stated(headers, "tokens")) is not None:
            flight.drained |= said.remaining is not None and said.remaining < flight.ask.tokens
            self._tokens.hear(said, now_s, sent_s=flight.sent_s, sent_total=flight.tokens_before)

    def observe(self, slot: int, outcome: Outcome) -> Ruling:
        """The attempt has ended so; what that means for its row and for rows held before it."""
        flight = self._flights[slot]
        assert not flight.observed, f"slot {slot} is observed twice"
        flight.observed = True
        if self._overruns is not None and self._overruns.most_in_flight(flight.ask.model) is not None:
            self._overruns.ended(flight.ask.model, outcome.verdict)
        was_open, now_s = self._state.phase is OPEN, self._loop.time()
        finding = self._learn(flight, outcome, now_s)
        ruling = self._state.observe(outcome, flight.order, now_s, finding)
        if not was_open and self._state.phase is OPEN:
            self._refusals.reopened(now_s)
        self._wake_first()
        return ruling

    def release(self, slot: int, spent_usd: Decimal | None, spent_tokens: int | None = None) -> None:
        """The slot is free, money and tokens are spent: the outcome is durable. None spends the whole reservation."""
        flight = self._flights.pop(slot)
        if not flight.observed:
            self._state.withdraw(flight.order)
            self._refusals.ended(flight.order, self._loop.time(), reached=False)
        self.purse.settle(flight.ask, spent_usd, spent_tokens)
        self._free.append(slot)
        self._wake_first()

    def close(self, stop: Stop) -> None:
        """Nothing is admitted any more: who waits and who comes gets `GateClosed`. The first reason stays."""
        self._state.close(stop)
        self._wake_first()

    def _learn(self, flight: _Flight, outcome: Outcome, now_s: float) -> Finding:
        """What the attempt's end teaches of limits. What was refused was not used, so it is given back; but not where
        the rate itself was learned from refusals: what is refused there would be sent again at once, and again.
        """
        if outcome.verdict is Verdict.FREE and not flight.settled:
            self._rates.correct(flight.ask, 0, 0)  # nothing was worked out, so no tokens were used
        if outcome.verdict is Verdict.SLOW and outcome.says_nothing:
            self._refusals.ended(flight.order, now_s, reached=False)
            return NOTHING
        if outcome.verdict is not Verdict.SLOW:
            reached = outcome.verdict is not Verdict.FREE or _has_status(outcome)
            if outcome.verdict is Verdict.OK:
                self._state.in_flight.knee.answered(
                    now_s,
                    now_s - flight.sent_s,
                    flight.others,
                    self._state.in_flight.allowed,
                    self._state.in_flight.most,
                    free=self._requests.learned is None and self._state.in_flight.crowding.cap is None,
                )
            self._refusals.ended(flight.order, now_s, reached=reached)
            return NOTHING
        if self._requests.learned is None:
            self._requests.settle(-1)
        if self._tokens.learned is None and not flight.settled:
            self._rates.correct(flight.ask, 0, 0)
        message = "" if outcome.error is None else outcome.error.message or ""
        limit = Limit.TOKENS if _names_tokens(message) else Limit.REQUESTS
        told_when = outcome.retry_after_s is not None
        return self._refusals.refused(flight.order, now_s, limit, told_when=told_when, empty=flight.drained)

    def _found(self, pace: AdaptiveRate) -> float | None:
        """The limit that holds although no one has told it; None where none does, or one that may be chance."""
        rates = [pace.stated_now, None if pace.learned is None else self._refusals.searches[pace.limit].confirmed]
        known = min((rate for rate in rates if rate is not None), default=None)
        return None if known is None or (pace.told is not None and known >= pace.told) else known

    async def _stand_in_line(self, ask: Ask, *, probes: bool) -> None:
        """Returns when this ask is first and lacks nothing; whoever is next has been woken, and runs after it took."""
        line = self._line
        turn = self._loop.create_future()
        line.append(turn)
        try:
            if line[0] is not turn:
                await turn
            while (lacking := self._lacks(ask, probes=probes)) is not None:
                line[0] = turn = self._loop.create_future()
                self._wait_for(lacking)
                await turn
        finally:
            line.remove(turn)
            self._wake_first()

    def _lacks(self, ask: Ask, *, probes: bool) -> Binding | None:
        """The same as `_lack`, but in doubt only for a probe."""
        if not probes and self._state.in_doubt:
            raise InDoubt
        return self._lack(ask)

    def _lack(self, ask: Ask) -> Binding | None:
        """What keeps this ask, first in line, from going now; None when nothing does. Takes nothing."""
        if self._state.stop is not None:
            raise GateClosed(self._state.stop)
        now_s = self._loop.time()
        was_open = self._state.phase is OPEN
        if (barred := self._state.binding(now_s)) is not None:
            return barred
        if not was_open and self._state.phase is OPEN:
            self._refusals.reopened(now_s)  # after a pause all go on at once, at a lower rate
        if len(self._flights) >= self._state.in_flight.most:
            return IN_FLIGHT
        if self.purse.is_kept and (lacking := self._lack_of_budget(self._widened(ask))) is not None:
            return lacking
        self._refusals.rise(now_s)
        return self._rates.lack(ask, now_s)

    def _widened(self, ask: Ask) -> Ask:
        """The ask with bounds as they are known at this moment: it may have stood in line while an answer came."""
        return ask if self._overruns is None else self._overruns.widened(ask)

    def _lack_of_budget(self, ask: Ask) -> Binding | None:
        if not self.purse.fits(ask):
            return self._wait_for_budget(ask)
        if self._overruns is None or not self.purse.rests_on_bounds:
            return None
        most = self._overruns.most_in_flight(ask.model)
        if most is None or sum(f.ask.model == ask.model and not f.observed for f in self._flights.values()) < most:
            return None
        return BUDGET  # the first answer of this model shows whether its bounds hold

    def _wait_for_budget(self, ask: Ask) -> Binding:
        """Some comes back only from what is in flight; with nothing in flight the budget is at its end."""
        if self._flights:
            return BUDGET
        stop = Stop(ExitCode.STOPPED, self.purse.refusal(ask))
        self._state.close(stop)
        raise GateClosed(stop)

    def _take(self, ask: Ask) -> int:
        ask = self._widened(ask)
        now_s = self._loop.time()
        before = self._requests.taken, self._tokens.taken
        self._rates.take(ask, now_s)
        self.purse.reserve(ask)
        slot = self._free.pop()
        others = self._refusals.out
        self._refusals.sent(now_s, ask.tokens)
        self._flights[slot] = _Flight(ask, self._state.admit(now_s), now_s, others, *before)
        return slot

    def _wait_for(self, lacking: Binding) -> None:
        """The first in line is woken when time alone lifts what it lacks; all else wakes it by being given back."""
        self._lacking = lacking
        if lacking.until_s is not None:
            at_s = max(lacking.until_s, self._loop.time() + TIMER_GRAIN_S)
            self._timer = self._loop.call_at(at_s, self._wake_first)

    def _wake_first(self) -> None:
        """The first in line looks again at what it lacks; no timer is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._line and not self._line[0].done():
            self._line[0].set_result(None)
        self.turns.wake()


def _has_status(outcome: Outcome) -> bool:
    return outcome.error is not None and outcome.error.http_status is not None


def _names_tokens(message: str) -> bool:
    return _TOKENS.search(message) is not None and _REQUESTS.search(message) is None
