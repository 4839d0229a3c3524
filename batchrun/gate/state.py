"""Whether the endpoint may be asked at all: one small state machine for every kind of trouble. PURE.

    Open ──a 429, an outage──→ Cooling(until) ──time──→ Probing ──its row is answered──→ Open
      └──a verdict on the run, met by one row only──────↗  └──more trouble──→ Cooling, for longer
    any of them ──two rows agree, an outage without end, close()──→ Stopped(why)

Probing lets one real row through at a time. Time is an argument (`now_s`, seconds of a clock that never jumps),
chance is a function; nothing here waits, sends or knows what a row is beyond its number.

An **episode** begins whenever what was believed of the endpoint becomes doubtful. Each attempt carries its `order`
among all that were admitted, so an answer is read for what it can prove: one sent before the episode began says
nothing about now. That is also why a suspect is only cleared by a row sent *after* its verdict had come: when a key
is revoked, older requests still bring good answers for minutes.
"""

from collections.abc import Callable
from typing import assert_never

import msgspec

from batchrun.errors import ExitCode
from batchrun.gate.admission import (
    OPEN,
    Binding,
    Cooling,
    Limit,
    Outcome,
    Phase,
    Probing,
    Ruling,
    Stop,
    Stopped,
)
from batchrun.gate.outage import Unanswered
from batchrun.records import RowError, Verdict

FIRST_IN_FLIGHT = 8
"""Attempts in flight before anything is known: enough to fill a normal connection set, few enough to be wrong with."""

ALIKE_ROWS = 10
"""So many first rows that fail alike are the job's fault: a wrong parameter refuses ten rows as it would a million."""

FIRST_REACH_S = 15.0
"""How long an endpoint that never gave a byte is tried: a name server's hiccup is over by then, a wrong name is not."""

BACKOFF_BASE_S = 1.0
BACKOFF_CAP_S = 60.0
"""Probes after 1, 2, 4 … 60 s: 10 of them in five minutes of outage, and never a minute and a half without a look."""

JITTER = 0.5
LEAST_JITTERED_S = 0.1
"""Up to half of the wait is added, never subtracted: no probe before its time, no two processes in step. After a short
wait that the server asked for, only a little."""

CALMER = 0.7
"""What is left in flight after an overload or connect trouble; a 5xx says nothing of load, a 429 only of pace."""

USED = 0.8
"""More is allowed in flight only while so much of it is used: else nobody knows whether the endpoint bears it."""

UNREACHED = frozenset({"dns", "refused", "connect", "tls"})
"""Failures before a word was said; after any other the server was there."""

IN_FLIGHT = Binding(Limit.IN_FLIGHT)
PROCEED = Ruling()
HOLD = Ruling(hold=True)


class _Suspicion(msgspec.Struct, frozen=True):
    """A verdict on the run that one row alone has met; attempts of order `since` and on were sent after it."""

    verdict: Verdict
    since: int


class GateState:
    """The machine. `phase` is what is believed; `successes` counts the good answers of this process.

    A row's failed attempt may count against the row only if `successes` has moved since the row was first asked:
    then the endpoint was well, and an outage burns no row.
    """

    def __init__(
        self,
        *,
        max_in_flight: int,
        first_in_flight: int = FIRST_IN_FLIGHT,
        max_outage_s: float,
        resumed: bool,
        uniform: Callable[[], float],
        on_change: Callable[[Phase, Phase], None],
    ) -> None:
        """`uniform` draws from [0, 1). `resumed` runs have had their first ten rows."""
        self.phase: Phase = OPEN
        self.successes = 0
        self.max_in_flight = max_in_flight
        self.allowed_in_flight = min(max(FIRST_IN_FLIGHT, first_in_flight), max_in_flight)
        self.why_in_flight = "at the start"
        self._max_outage_s = max_outage_s
        self._uniform = uniform
        self._on_change = on_change
        self._sent = 0  # attempts admitted so far: the order of the next one
        self._episode = 0  # the first order of this episode
        self._trouble = 0  # the first order after the last cooling began; attempts before it are its stragglers
        self._in_flight = 0  # attempts out, stragglers not counted
        self._most_in_flight = 0  # since the round began
        self._round = self._left_in_round = self.allowed_in_flight  # answers a round has, and still lacks
        self._ramp_to = max_in_flight  # below it one more with every answer, above it with every round
        self._probe_out = False
        self._extended = False
        self._coolings = 0
        self._unwell_since_s: float | None = None
        self._reached = False
        self._unanswered = Unanswered()
        self._suspicions: dict[int, _Suspicion] = {}
        self._first_failures: list[RowError | None] | None = None if resumed else []

    @property
    def stop(self) -> Stop | None:
        """Why admission has ended; None while it has not."""
        return self.phase.stop if isinstance(self.phase, Stopped) else None

    def limit_in_flight(self, max_in_flight: int) -> None:
        """No more than so many are out from now on, as attempts that are out end."""
        self.max_in_flight = max_in_flight
        self.allowed_in_flight = min(self.allowed_in_flight, max_in_flight)
        self.why_in_flight = "told"

    def binding(self, now_s: float) -> Binding | None:
        """What bars the next row; None when `admit` may be called. A cooling whose time is over becomes probing."""
        if self.phase is OPEN:
            return IN_FLIGHT if self._in_flight >= self.allowed_in_flight else None
        match self.phase:
            case Cooling(until_s=until_s, because=because) if now_s < until_s:
                return Binding(Limit.COOLING, until_s, because)
            case Cooling(why=why):
                self._probe(why)
            case Stopped():
                return Binding(Limit.STOPPED)
        return Binding(Limit.PROBING) if self._probe_out else None

    def admit(self) -> int:
        """One attempt more is out; its order among all, to be given back with its outcome."""
        self._in_flight += 1
        if self._in_flight > self._most_in_flight:
            self._most_in_flight = self._in_flight
        self._probe_out = True
        self._sent += 1
        return self._sent - 1

    def withdraw(self, order: int) -> None:
        """An admitted attempt is no longer out: it has ended, or was never sent."""
        if order >= self._trouble:
            self._in_flight -= 1
        if order >= self._episode:
            self._probe_out = False

    def close(self, stop: Stop) -> None:
        """Nothing is admitted any more. The first reason stays the reason."""
        if self.stop is None:
            self._enter(Stopped(stop))

    def observe(self, outcome: Outcome, order: int, now_s: float) -> Ruling:
        """The outcome is taken into account, once per admitted attempt; what it means for rows."""
        self.withdraw(order)
        if outcome.at_tail:
            return PROCEED
        match outcome.verdict:
            case Verdict.OK:
                return self._succeeded(outcome.row, order)
            case Verdict.ROW:
                return self._failed_alone(outcome, order)
            case Verdict.FREE | Verdict.MAYBE:
                return self._failed_unanswered(outcome, order, now_s)
            case Verdict.SLOW:
                return self._told_to_slow(outcome, order, now_s)
            case Verdict.PAUSE | Verdict.STOP:
                return self._judged_the_run(outcome)
            case _:
                assert_never(outcome.verdict)

    def _succeeded(self, row: int, order: int) -> Ruling:
        self.successes += 1
        self._first_failures = None
        own: tuple[int, ...] = ()
        if self._suspicions:
            self._forget_overloads()
            own = self._cleared_by(row, order)
        self._answered(order)
        return Ruling(own=own) if own else PROCEED

    def _failed_alone(self, outcome: Outcome, order: int) -> Ruling:
        """An answer, if a bad one: the endpoint works. That the key does, only a success would show."""
        self._count_alike(outcome.error)
        self._forget_overloads()
        self._answered(order)
        return PROCEED

    def _failed_unanswered(self, outcome: Outcome, order: int, now_s: float) -> Ruling:
        if order < self._trouble or self._outage_is_over_long(outcome, now_s):
            return PROCEED
        probe_failed = isinstance(self.phase, Probing) and order >= self._episode
        is_outage = self._unanswered.fail(outcome.row, order, sent=self._sent, allowed_in_flight=self.allowed_in_flight)
        if is_outage or probe_failed:
            answered = outcome.error is not None and outcome.error.http_status is not None
            self._calm_down(1.0 if answered else CALMER, _text(outcome.error))
            why = f"the endpoint is not answering: {_text(outcome.error)}"
            self._cool(why, _in_brief(outcome.error), now_s, None)
        return PROCEED

    def _told_to_slow(self, outcome: Outcome, order: int, now_s: float) -> Ruling:
        """A 429 speaks for everyone. Any other overload, while all is open, may be one row's own: ask a second."""
        floor_s = outcome.retry_after_s
        paced = outcome.error is not None and outcome.error.http_status == 429
        if order < self._trouble:
            self._extend_once(now_s + (floor_s or 0.0))
        elif self._outage_is_over_long(outcome, now_s):
            pass
        elif self.phase is OPEN and not paced:
            self._suspect(outcome)
        else:
            if not paced:
                self._calm_down(CALMER, _text(outcome.error))
            self._cool(_text(outcome.error), _in_brief(outcome.error), now_s, floor_s, paced=paced)
        return PROCEED

    def _judged_the_run(self, outcome: Outcome) -> Ruling:
        """Two that agree end the run: another row, or the same one again, which is asked twice only when alone."""
        if any(suspicion.verdict is outcome.verdict for suspicion in self._suspicions.values()):
            exit_code = ExitCode.PAUSED if outcome.verdict is Verdict.PAUSE else ExitCode.USAGE
            self.close(Stop(exit_code, _text(outcome.error)))
        else:
            self._suspect(outcome)
        return HOLD

    def _answered(self, order: int) -> None:
        """The endpoint gave an answer. Sent after the last trouble, it reopens the gate and may let more in flight."""
        self._unanswered.answer(order)
        self._unwell_since_s = None
        self._reached = True
        if order < self._trouble:
            return
        if self.allowed_in_flight < self.max_in_flight and self._first_failures is None:
            self._grow()
        if not self._suspicions and isinstance(self.phase, Probing):
            self._coolings = 0
            self._enter(OPEN)

    def _grow(self) -> None:
        """One more in flight with every answer, which doubles it with every round; after a trouble only up to what was
        borne before, and one more a round from there. Only while what is allowed is used.
        """
        self._left_in_round -= 1
        round_is_over = self._left_in_round <= 0
        used = self._most_in_flight >= USED * self._round
        if used and (round_is_over or self.allowed_in_flight < self._ramp_to):
            self.allowed_in_flight += 1
            self.why_in_flight = "what was allowed was used, without trouble"
        if round_is_over:
            self._round = self._left_in_round = self.allowed_in_flight
            self._most_in_flight = self._in_flight

    def _calm_down(self, share: float, why: str) -> None:
        """Fewer in flight: one, and then a ramp up to this share of what was allowed before the trouble."""
        if not self._coolings:
            self._ramp_to = max(1, int(self.allowed_in_flight * share))
        self.allowed_in_flight = self._round = self._left_in_round = 1
        self._most_in_flight = 0
        self.why_in_flight = f"a ramp up to {self._ramp_to} after: {why}"

    def _count_alike(self, error: RowError | None) -> None:
        """Ten first rows with one and the same failure close the gate; the first that differs ends the count.

        A content policy speaks of the rows: a file may well begin with ten that it refuses.
        """
        if error is not None and error.kind == "content_policy":
            self._first_failures = None
        failures = self._first_failures
        if failures is None:
            return
        failures.append(error)
        if _kind(failures[0]) != _kind(error):
            self._first_failures = None
        elif len(failures) == ALIKE_ROWS:
            self.close(Stop(ExitCode.USAGE, f"the first {ALIKE_ROWS} rows all failed alike: {_text(error)}"))

    def _suspect(self, outcome: Outcome) -> None:
        """Admission stops at once but for one row, which shows whether the verdict was on the run."""
        self._episode = self._sent
        self._suspicions[outcome.row] = _Suspicion(outcome.verdict, self._episode)
        if not isinstance(self.phase, Cooling | Stopped):
            self._probe(_text(outcome.error))

    def _cleared_by(self, row: int, order: int) -> tuple[int, ...]:
        """Forgets what this row's success disproves; the other rows whose verdict was their own."""
        cleared = [r for r, suspicion in self._suspicions.items() if r == row or order >= suspicion.since]
        for suspect in cleared:
            del self._suspicions[suspect]
        return tuple(suspect for suspect in cleared if suspect != row)

    def _forget_overloads(self) -> None:
        """Any answer disproves an overload; its row is not held for it, only asked again."""
        self._suspicions = {r: s for r, s in self._suspicions.items() if s.verdict is not Verdict.SLOW}

    def _outage_is_over_long(self, outcome: Outcome, now_s: float) -> bool:
        """True, and the gate closed, when nothing was answered for longer than `max_outage_s`; an endpoint that was
        never reached at all, in this process, is not waited for: its name or address is likely wrong.
        """
        self._reached |= outcome.error is None or outcome.error.http_status is not None
        if self._unwell_since_s is None:
            self._unwell_since_s = now_s
        patience_s = self._max_outage_s if self._reached else min(FIRST_REACH_S, self._max_outage_s)
        if now_s - self._unwell_since_s <= patience_s:
            return False
        unreached = not self._reached and outcome.error is not None and outcome.error.kind in UNREACHED
        what = "the endpoint was never reached" if unreached else "no answer"
        self.close(Stop(ExitCode.PAUSED, f"{what} for {_duration(patience_s)}: {_text(outcome.error)}"))
        return True

    def _cool(self, why: str, because: str, now_s: float, floor_s: float | None, *, paced: bool = False) -> None:
        """Nothing goes out until the server's own wait or the backoff is over; clamped first, jittered then.

        A first 429 that says how long is taken at its word (`paced`): the endpoint is well, and the pace is lowered.
        """
        backoff_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(self._coolings, 30))
        if paced and floor_s is not None and not self._coolings:
            backoff_s = min(backoff_s, max(floor_s, LEAST_JITTERED_S))
            wait_s = floor_s
        else:
            wait_s = max(floor_s or 0.0, backoff_s)
        until_s = now_s + wait_s + self._uniform() * JITTER * backoff_s
        self._coolings += 1
        self._episode = self._sent
        self._trouble = self._episode
        self._unanswered.forget()
        self._in_flight = 0
        self._extended = False
        self._enter(Cooling(until_s, why, because))

    def _extend_once(self, until_s: float) -> None:
        """A straggler repeats no cooling; only a longer wait asked for by the server moves its end, and only once."""
        if isinstance(self.phase, Cooling) and until_s > self.phase.until_s and not self._extended:
            self._extended = True
            jitter_s = self._uniform() * JITTER * BACKOFF_BASE_S
            self._enter(msgspec.structs.replace(self.phase, until_s=until_s + jitter_s))

    def _probe(self, why: str) -> None:
        self._probe_out = False
        self._enter(Probing(why))

    def _enter(self, phase: Phase) -> None:
        if isinstance(self.phase, Stopped):
            return
        before, self.phase = self.phase, phase
        self._on_change(before, phase)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _kind(error: RowError | None) -> tuple[str, int | None, str | None] | None:
    return None if error is None else (error.kind, error.http_status, error.code)


def _in_brief(error: RowError | None) -> str:
    """The status alone, or the kind of a failure without one: what a progress line has room for."""
    if error is None:
        return "no reason given"
    return error.kind.replace("_", " ") if error.http_status is None else str(error.http_status)


def _text(error: RowError | None) -> str:
    """The reason in the server's words, with its status."""
    if error is None:
        return "no reason was given"
    words = error.message or error.kind
    status = f"HTTP {error.http_status}"
    return words if error.http_status is None or words.startswith(status) else f"{status}: {words}"
