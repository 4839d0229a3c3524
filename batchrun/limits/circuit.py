"""Whether the endpoint may be asked at all: one small state machine for every kind of trouble. PURE.

    Open ──a storm of refusals, an outage──→ Cooling(until) ──time──→ Probing ──its row is answered──→ Open
      │                                        └──time, after a first storm: the rate is lowered──────↗
      └──a verdict on the run, met by one row only──→ Probing ──more trouble──→ Cooling, for longer
    any of them ──two rows agree, an outage without end, close()──→ Stopped(why)

One refusal is no trouble: its row waits, and `refusals` finds out what many of them are evidence of.

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
from batchrun.limits.admission import OPEN, Binding, Cooling, Limit, Outcome, Phase, Probing, Ruling, Stop, Stopped
from batchrun.limits.in_flight import InFlight
from batchrun.limits.outage import Unanswered
from batchrun.limits.refusals import NOTHING, Finding
from batchrun.records import RowError, Verdict

ALIKE_ROWS = 10
"""So many first rows that fail alike are the job's fault: a wrong parameter refuses ten rows as it would a million."""

FIRST_REACH_S = 15.0
"""How long an endpoint that never gave a byte is tried: a name server's hiccup is over by then, a wrong name is not."""

BACKOFF_BASE_S = 1.0
BACKOFF_CAP_S = 60.0
"""Probes after 1, 2, 4 … 60 s: 10 of them in five minutes of outage, and never a minute and a half without a look."""

PATIENT_COOLINGS = 3
"""After a storm of 429 in the midst of answers, so many more coolings of a second before they double: a bucket fills
within seconds, and many spells are as short."""

JITTER = 0.5
LEAST_JITTERED_S = 0.1
"""Up to half of the wait is added, never subtracted: no probe before its time, no two processes in step. After a short
wait that the server asked for, only a little."""

CALMER = 0.7
"""What is left in flight after an overload or connect trouble; a 5xx says nothing of load, a 429 only of pace."""

UNREACHED = frozenset({"dns", "refused", "connect", "tls"})
"""Failures before a word was said; after any other the server was there."""

IN_FLIGHT = Binding(Limit.IN_FLIGHT)
PROCEED = Ruling()
HOLD = Ruling(hold=True)


class _Suspicion(msgspec.Struct, frozen=True):
    """A verdict on the run that one row alone has met; attempts of order `since` and on were sent after it."""

    verdict: Verdict
    since: int


class Circuit:
    """The machine. `phase` is what is believed; `successes` counts the good answers of this process.

    A row's failed attempt may count against the row only if `successes` has moved since the row was first asked:
    then the endpoint was well, and an outage burns no row.
    """

    def __init__(
        self,
        *,
        in_flight: InFlight,
        max_outage_s: float,
        resumed: bool,
        uniform: Callable[[], float],
        on_change: Callable[[Phase, Phase], None],
    ) -> None:
        """`uniform` draws from [0, 1). `resumed` runs have had their first ten rows."""
        self.phase: Phase = OPEN
        self.successes = 0
        self.in_flight = in_flight
        self._max_outage_s = max_outage_s
        self._uniform = uniform
        self._on_change = on_change
        self._sent = 0  # attempts admitted so far: the order of the next one
        self._episode = 0  # the first order of this episode
        self._trouble = 0  # the first order after the last cooling began; attempts before it are its stragglers
        self._out = 0  # attempts out, stragglers not counted
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

    @property
    def in_doubt(self) -> bool:
        """True while one row at a time is let through, or will be, to show whether the endpoint is well."""
        return isinstance(self.phase, Probing) or (isinstance(self.phase, Cooling) and self.phase.probe)

    def unanswered_s(self, now_s: float) -> float:
        """How long the endpoint has failed without an answer between; 0 where the last attempt was answered."""
        return 0.0 if self._unwell_since_s is None else now_s - self._unwell_since_s

    def binding(self, now_s: float) -> Binding | None:
        """What bars the next row; None when `admit` may be called. A cooling whose time is over becomes probing."""
        if self.phase is OPEN:
            return self._room(now_s)
        match self.phase:
            case Cooling(until_s=until_s, because=because) if now_s < until_s:
                return Binding(Limit.COOLING, until_s, because)
            case Cooling(probe=False):
                self._enter(OPEN)
                return self._room(now_s)
            case Cooling(why=why):
                self._probe(why)
            case Stopped():
                return Binding(Limit.STOPPED)
        return Binding(Limit.PROBING) if self._probe_out else None

    def _room(self, now_s: float) -> Binding | None:
        ready_s = self.in_flight.ready_s(self._out, now_s)
        if ready_s == now_s:
            return None
        return IN_FLIGHT if ready_s is None else Binding(Limit.IN_FLIGHT, ready_s)

    def admit(self, now_s: float) -> int:
        """One attempt more is out; its order among all, to be given back with its outcome."""
        self._out += 1
        self.in_flight.sent(self._out, now_s)
        self._probe_out = True
        self._sent += 1
        return self._sent - 1

    def withdraw(self, order: int) -> None:
        """An admitted attempt is no longer out: it has ended, or was never sent."""
        if order >= self._trouble:
            self._out -= 1
        if order >= self._episode:
            self._probe_out = False

    def close(self, stop: Stop) -> None:
        """Nothing is admitted any more. The first reason stays the reason."""
        if self.stop is None:
            self._enter(Stopped(stop))

    def observe(self, outcome: Outcome, order: int, now_s: float, finding: Finding = NOTHING) -> Ruling:
        """The outcome is taken into account, once per admitted attempt; what it means for rows.

        `finding` is what a refusal is evidence of.
        """
        self.withdraw(order)
        if outcome.says_nothing:
            return PROCEED
        match outcome.verdict:
            case Verdict.OK:
                return self._succeeded(outcome.row, order, now_s)
            case Verdict.ROW:
                return self._failed_alone(outcome, order, now_s)
            case Verdict.FREE | Verdict.MAYBE:
                return self._failed_unanswered(outcome, order, now_s)
            case Verdict.SLOW:
                return self._refused(outcome, order, now_s, finding)
            case Verdict.PAUSE | Verdict.STOP:
                return self._judged_the_run(outcome)
            case _:
                assert_never(outcome.verdict)

    def _succeeded(self, row: int, order: int, now_s: float) -> Ruling:
        self.successes += 1
        self._first_failures = None
        own = self._cleared_by(row, order) if self._suspicions else ()
        self._answered(order, now_s)
        return Ruling(own=own) if own else PROCEED

    def _failed_alone(self, outcome: Outcome, order: int, now_s: float) -> Ruling:
        """An answer, if a bad one: the endpoint works. That the key does, only a success would show."""
        self._count_alike(outcome.error)
        self._answered(order, now_s)
        return PROCEED

    def _failed_unanswered(self, outcome: Outcome, order: int, now_s: float) -> Ruling:
        if order < self._trouble or self._outage_is_over_long(outcome, now_s):
            return PROCEED
        probe_failed = isinstance(self.phase, Probing) and order >= self._episode
        is_outage = self._unanswered.fail(outcome.row, order, sent=self._sent, allowed_in_flight=self.in_flight.allowed)
        if is_outage or probe_failed:
            answered = outcome.error is not None and outcome.error.http_status is not None
            self.in_flight.calm_down(1.0 if answered else CALMER, _text(outcome.error), first=not self._coolings)
            why = f"the endpoint is not answering: {_text(outcome.error)}"
            self._cool(why, _in_brief(outcome.error), now_s, None)
        return PROCEED

    def _refused(self, outcome: Outcome, order: int, now_s: float, finding: Finding) -> Ruling:
        """One refusal is its row's matter. A storm of them, or a probe that is refused, makes everyone wait."""
        error, floor_s = outcome.error, outcome.retry_after_s
        if order < self._trouble:
            self._extend_once(now_s + (floor_s or 0.0))
        elif not self._outage_is_over_long(outcome, now_s):
            probing = isinstance(self.phase, Probing) and order >= self._episode
            if finding.storm or (probing and not self._suspicions):
                if finding.storm and finding.taken:
                    self._coolings = 0
                paced = error is not None and error.http_status == 429
                if not paced:
                    self.in_flight.calm_down(CALMER, _text(error), first=not self._coolings)
                # after a storm of 429 the rate is lowered, so all may go on at once; but not where nothing is taken
                probe = not (paced and finding.storm and finding.taken and self.successes)
                self._cool(_text(error), _in_brief(error), now_s, floor_s, paced=paced, probe=probe)
            else:
                self._unwell_since_s = None if finding.taken else self._unwell_since_s
        return PROCEED

    def _judged_the_run(self, outcome: Outcome) -> Ruling:
        """Two that agree end the run: another row, or the same one again, which is asked twice only when alone."""
        if any(suspicion.verdict is outcome.verdict for suspicion in self._suspicions.values()):
            exit_code = ExitCode.PAUSED if outcome.verdict is Verdict.PAUSE else ExitCode.USAGE
            self.close(Stop(exit_code, _text(outcome.error)))
        else:
            self._suspect(outcome)
        return HOLD

    def _answered(self, order: int, now_s: float) -> None:
        """The endpoint gave an answer. Sent after the last trouble, it reopens the gate and may let more in flight."""
        self._unanswered.answer(order)
        self._unwell_since_s = None
        self._reached = True
        if order < self._trouble:
            return
        if self._first_failures is None:
            self.in_flight.answered(self._out, now_s)
        if not self._suspicions and isinstance(self.phase, Probing):
            self._coolings = 0
            self._enter(OPEN)

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

    def _cool(
        self, why: str, because: str, now_s: float, floor_s: float | None, *, paced: bool = False, probe: bool = True
    ) -> None:
        """Nothing goes out until the server's own wait or the backoff is over; clamped first, jittered then.

        A first 429 that says how long is taken at its word (`paced`): the endpoint is well, and the pace is lowered.
        """
        doublings = max(0, self._coolings - PATIENT_COOLINGS) if paced and self.successes else self._coolings
        backoff_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(doublings, 30))
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
        self._out = 0
        self._extended = False
        self._enter(Cooling(until_s, why, because, probe))

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
