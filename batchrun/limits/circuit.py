"""The circuit breaker: whether the endpoint may be sent to at all. One state machine for every kind of trouble. PURE.

    Open ──storm of refusals, outage──→ Cooling(until) ──time──→ Probing ──its row is answered──→ Open
      │                                   └──time, after a first storm: the rate was lowered────────↗
      └──run-wide verdict from one row──→ Probing ──more trouble──→ Cooling, for longer
    any of them ──second row confirms, outage too long, close()──→ Stopped(why)

A single refusal changes nothing here: its row waits, and `Refusals` decides what many of them mean.

The phases are named as a gate's. In the usual words of circuit breakers our Open is closed, Cooling is open, and
Probing is half-open.
"""

from collections.abc import Callable
from typing import assert_never

import msgspec

from batchrun.errors import ExitCode
from batchrun.limits.admission import OPEN, Binding, Cooling, Decision, Limit, Outcome, Phase, Probing, Stop, Stopped
from batchrun.limits.in_flight import InFlight
from batchrun.limits.outage import Unanswered
from batchrun.limits.refusals import NOTHING, Conclusion
from batchrun.limits.run_verdicts import RunVerdicts
from batchrun.records import OK, OTHER_API, RowError, Verdict

ALIKE_ROWS = 10
"""This many first rows that fail alike are the job's fault: a wrong parameter fails a million rows as it does ten."""

FIRST_REACH_S = 15.0
"""How long to try an endpoint that never sent a byte: a DNS hiccup is over by then, a wrong name is not."""

FIRST_ANSWER_S = 60.0
"""The same for one that answers, and never with a completion: a login page, or the API of another path. Each of these
answers may be billed."""

BACKOFF_BASE_S = 1.0
BACKOFF_CAP_S = 45.0
"""Probes after 1, 2, 4 … 45 s: 11 in a five-minute outage, and at least one every 68 s. (With 60 s, the end of ten
minutes was noticed up to 75 s late. Growing by 60 % instead, it is noticed sooner, but a minute met 20 requests.)"""

PATIENT_COOLINGS = 3
"""After a storm of 429 among answers, this many more coolings of a second before they double: a bucket refills
within seconds, and many storms are as short."""

JITTER = 0.5
LEAST_JITTERED_S = 0.1
"""Up to half of the wait is added, never subtracted: no probe is early, and no two processes are in step. Little is
added to a short wait that the server named."""

IN_FLIGHT_KEPT = 0.7
"""The factor for requests in flight after an overload or a connection failure. A 5xx is no sign of load, and a 429
only of the rate."""

UNREACHED = frozenset({"dns", "refused", "connect", "tls"})
"""Failures before a byte was sent; after any other kind the server was reached."""

UNREADABLE = frozenset({"unreadable", "bad_encoding", "malformed_http"})
"""The kinds of a 2xx that is no completion."""

IN_FLIGHT = Binding(Limit.IN_FLIGHT)
PROCEED = Decision()
HOLD = Decision(hold=True)


class Circuit:
    """The state machine: `phase` is the current state, `successes` counts this process's good answers, `out` the
    attempts in flight.

    A failed attempt may count against its row only if `successes` has grown since the row was first sent: then the
    endpoint was working, so an outage uses up no row's attempts.

    An **episode** begins whenever the endpoint's state becomes doubtful. Each attempt has an `order` among all that
    were admitted: one sent before the episode is no evidence of the present.
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
        """`uniform` draws from [0, 1). In `resumed` runs the first rows were checked earlier."""
        self.phase: Phase = OPEN
        self.successes = 0
        self.in_flight = in_flight
        self._max_outage_s = max_outage_s
        self._uniform = uniform
        self._on_change = on_change
        self._sent = 0  # attempts admitted so far: the order of the next one
        self._episode = 0  # the first order of this episode
        self._trouble = 0  # the first order after the last cooling began; attempts before it are its stragglers
        self.out = 0  # attempts out, stragglers not counted
        self._probe_out = False
        self._extended = False
        self._coolings = 0
        self._failing_since_s: float | None = None
        self._reached = False
        self._unanswered = Unanswered()
        self._verdicts = RunVerdicts()
        self._to_hear = 0  # attempts that were in flight when the first verdict was suspected, and still are
        self._first_failures: list[RowError | None] | None = None if resumed else []

    @property
    def stop(self) -> Stop | None:
        """Why admission has ended; None while it has not."""
        return self.phase.stop if isinstance(self.phase, Stopped) else None

    @property
    def in_doubt(self) -> bool:
        """True while one row at a time is sent, or will be, to find out whether the endpoint works."""
        if self.phase is OPEN:
            return False
        return isinstance(self.phase, Probing) or (isinstance(self.phase, Cooling) and self.phase.probe)

    def unanswered_s(self, now_s: float) -> float:
        """How long the endpoint has failed without an answer; 0 if the last attempt was answered."""
        return 0.0 if self._failing_since_s is None else now_s - self._failing_since_s

    def binding(self, now_s: float) -> Binding | None:
        """What blocks the next attempt; None if `admit` may be called. A cooling that is over becomes probing."""
        if self.phase is OPEN:
            return None if self.out < self.in_flight.allowed else self._room(now_s)
        match self.phase:
            case Cooling(until_s=until_s, because=because) if now_s < until_s:
                return Binding(Limit.COOLING, until_s, because)
            case Cooling(probe=False):
                self._enter(OPEN)
                return self._room(now_s)
            case Cooling(why=why):
                self._probe(why)
        if isinstance(self.phase, Stopped):
            return Binding(Limit.STOPPED)
        return Binding(Limit.PROBING) if self._probe_out or self._verdicts.stop is not None else None

    def _room(self, now_s: float) -> Binding | None:
        ready_s = self.in_flight.ready_s(self.out, now_s)
        if ready_s == now_s:
            return None
        return IN_FLIGHT if ready_s is None else Binding(Limit.IN_FLIGHT, ready_s)

    def admit(self, now_s: float) -> int:
        """Counts one more attempt in flight; returns its order, to be passed back with its outcome."""
        self.out += 1
        self.in_flight.sent(self.out, now_s)
        self._probe_out = True
        self._sent += 1
        return self._sent - 1

    def withdraw(self, order: int) -> None:
        """An admitted attempt is no longer in flight: it ended, or was never sent."""
        if order >= self._trouble:
            self.out -= 1
            if order < self._episode:
                self._to_hear -= 1
        if order >= self._episode:
            self._probe_out = False
        stop = self._verdicts.stop
        # a confirmed verdict stops the run; one on a key waits for the rows in flight, which may disprove it
        if stop is not None and (self._to_hear <= 0 or not self._verdicts.may_be_of_one_key):
            self.close(stop)

    def close(self, stop: Stop) -> None:
        """Ends admission. The first reason is kept."""
        if self.stop is None:
            self._enter(Stopped(stop))

    def reopen(self, why: str) -> None:
        """After a stop: one row at a time is sent again, because the cause may be gone (a replaced key)."""
        self._verdicts.forget()
        self._unanswered.forget()
        self._failing_since_s = None
        self._first_failures = None
        self._coolings = 0
        self._episode = self._trouble = self._sent
        self.out = self._to_hear = 0
        self.phase, before = OPEN, self.phase
        self._on_change(before, self.phase)
        self._probe(why)

    def observe(self, outcome: Outcome, order: int, now_s: float, conclusion: Conclusion = NOTHING) -> Decision:
        """Takes one admitted attempt's outcome into account; returns what it means for rows.

        `conclusion` is what `Refusals` concluded from a refusal.
        """
        decision = PROCEED
        if outcome.verdict is OK:  # most attempts; a constant, because reading a member of an enum is slow
            self.successes += 1
            self._first_failures = None
            if self._verdicts and (own := self._verdicts.disproved_by(outcome.row, order)):
                decision = Decision(own=own)
            self._answered(order, now_s)
        elif not outcome.says_nothing:
            match outcome.verdict:
                case Verdict.ROW:  # a bad answer is still an answer, but only a success shows that the key works
                    self._count_alike(outcome.error)
                    self._answered(order, now_s)
                case Verdict.FREE | Verdict.MAYBE:
                    self._got_no_answer(outcome, order, now_s)
                case Verdict.SLOW:
                    self._refused(outcome, order, now_s, conclusion)
                case Verdict.PAUSE | Verdict.STOP:
                    decision = self._run_failed(outcome, order)
                case _:
                    assert_never(outcome.verdict)
        self.withdraw(order)
        return decision

    def _got_no_answer(self, outcome: Outcome, order: int, now_s: float) -> None:
        """Enough rows in a row without an answer, or a probe without one, pause admission."""
        if not self.successes and outcome.error is not None and outcome.error.kind == OTHER_API:
            self._suspect(outcome, order)
            return
        if order < self._trouble or self._outage_is_too_long(outcome, now_s):
            return
        probe_failed = isinstance(self.phase, Probing) and order >= self._episode
        is_outage = self._unanswered.fail(outcome.row, order, sent=self._sent, allowed_in_flight=self.in_flight.allowed)
        if is_outage or probe_failed:
            answered = outcome.error is not None and outcome.error.http_status is not None
            kept = 1.0 if answered else IN_FLIGHT_KEPT
            self.in_flight.back_off(kept, _reason(outcome.error), first=not self._coolings)
            why = f"the endpoint is not answering: {_reason(outcome.error)}"
            self._cool(why, _brief_reason(outcome.error), now_s, None)

    def _refused(self, outcome: Outcome, order: int, now_s: float, conclusion: Conclusion) -> None:
        """A single refusal only delays its row. A storm, or a refused probe, pauses admission."""
        error, floor_s = outcome.error, outcome.retry_after_s
        if order < self._trouble:
            # a straggler starts no new cooling; a longer wait named by the server extends it, once
            until_s = now_s + (floor_s or 0.0)
            if isinstance(self.phase, Cooling) and until_s > self.phase.until_s and not self._extended:
                self._extended = True
                until_s += self._uniform() * JITTER * BACKOFF_BASE_S
                self._enter(msgspec.structs.replace(self.phase, until_s=until_s))
        elif not self._outage_is_too_long(outcome, now_s):
            probing = isinstance(self.phase, Probing) and order >= self._episode
            if conclusion.storm or (probing and not self._verdicts):
                if conclusion.storm and conclusion.accepted:
                    self._coolings = 0
                paced = error is not None and error.http_status == 429
                if not paced:
                    self.in_flight.back_off(IN_FLIGHT_KEPT, _reason(error), first=not self._coolings)
                # after a storm of 429 the rate is lowered, so all may be sent at once; but not if nothing was accepted
                probe = not (paced and conclusion.storm and conclusion.accepted and self.successes)
                self._cool(_reason(error), _brief_reason(error), now_s, floor_s, paced=paced, probe=probe)
            else:
                self._failing_since_s = None if conclusion.accepted else self._failing_since_s

    def _run_failed(self, outcome: Outcome, order: int) -> Decision:
        """The row is held until other rows confirm the verdict, or the same one, sent when no other is left; or until
        an answer disproves it.
        """
        if self._verdicts.is_rows_own(outcome, order, self.successes):
            return Decision(hold=True, own=(outcome.row,))
        self._suspect(outcome, order)
        return HOLD

    def _suspect(self, outcome: Outcome, order: int) -> None:
        """One row at a time shows whether the verdict is the run's."""
        why = _reason(outcome.error)
        exit_code = ExitCode.PAUSED if outcome.verdict is Verdict.PAUSE else ExitCode.USAGE
        is_first = not self._verdicts
        if is_first:
            self._episode, self._to_hear = self._sent, self.out
        self._verdicts.add(outcome, order, self._sent, Stop(exit_code, why))
        if self.phase is OPEN or (is_first and isinstance(self.phase, Probing)):
            self._probe(why)

    def _answered(self, order: int, now_s: float) -> None:
        """An answer came. If sent after the last trouble, it closes the episode and may allow more in flight."""
        self._unanswered.answer(order)
        self._failing_since_s = None
        self._reached = True
        if order < self._trouble:
            return
        if self._first_failures is None:
            self.in_flight.answered(self.out - 1, now_s)  # without this one, which is withdrawn next
        if self.phase is not OPEN and not self._verdicts and isinstance(self.phase, Probing):
            self._coolings = 0
            self._enter(OPEN)

    def _count_alike(self, error: RowError | None) -> None:
        """Ten first rows with the same failure close the gate; a different one ends the count.

        A content policy refusal also ends it: that is about the rows, and ten of them may well come first in a file.
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
            self.close(Stop(ExitCode.USAGE, f"the first {ALIKE_ROWS} rows all failed alike: {_reason(error)}"))

    def _outage_is_too_long(self, outcome: Outcome, now_s: float) -> bool:
        """Closes the gate and returns True after `max_outage_s` without an answer; much earlier if this process never
        reached the endpoint, or only got answers that are no completions: then its address is probably wrong.
        """
        self._reached |= outcome.error is None or outcome.error.http_status is not None
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        patience_s = self._max_outage_s
        if not self._reached:
            patience_s = min(FIRST_REACH_S, patience_s)
        elif self._first_failures is not None and outcome.error is not None and outcome.error.kind in UNREADABLE:
            patience_s = min(FIRST_ANSWER_S, patience_s)
        if now_s - self._failing_since_s <= patience_s:
            return False
        unreached = not self._reached and outcome.error is not None and outcome.error.kind in UNREACHED
        what = "the endpoint was never reached" if unreached else "no answer"
        duration = f"{patience_s:.0f} seconds" if patience_s < 120 else f"{patience_s / 60:.0f} minutes"
        self.close(Stop(ExitCode.PAUSED, f"{what} for {duration}: {_reason(outcome.error)}"))
        return True

    def _cool(
        self, why: str, because: str, now_s: float, floor_s: float | None, *, paced: bool = False, probe: bool = True
    ) -> None:
        """Pauses until the server's own wait or the backoff is over: clamped first, then jittered.

        A first 429 that names a wait is believed (`paced`): the endpoint works, and the rate is lowered.
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
        self.out = self._to_hear = 0
        self._extended = False
        self._enter(Cooling(until_s, why, because, probe))

    def _probe(self, why: str) -> None:
        self._probe_out = False
        self._enter(Probing(why))

    def _enter(self, phase: Phase) -> None:
        if isinstance(self.phase, Stopped):
            return
        before, self.phase = self.phase, phase
        self._on_change(before, phase)


def _kind(error: RowError | None) -> tuple[str, int | None, str | None] | None:
    return None if error is None else (error.kind, error.http_status, error.code)


def _brief_reason(error: RowError | None) -> str:
    """The status, or the kind of failure without one: short enough for the progress line."""
    if error is None:
        return "no reason given"
    return error.kind.replace("_", " ") if error.http_status is None else str(error.http_status)


def _reason(error: RowError | None) -> str:
    """The reason in the server's words, with its status."""
    if error is None:
        return "no reason was given"
    words = error.message or error.kind
    status = f"HTTP {error.http_status}"
    return words if error.http_status is None or words.startswith(status) else f"{status}: {words}"
