"""What the gate believes of the endpoint: every kind of failure, step by step on a clock moved by hand."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import ExitCode
from batchrun.limits.admission import OPEN, Binding, Cooling, Decision, Limit, Outcome, Phase, Probing, Stop, Stopped
from batchrun.limits.circuit import ALIKE_ROWS, BACKOFF_CAP_S, FIRST_ANSWER_S, FIRST_REACH_S, JITTER, Circuit
from batchrun.limits.in_flight import FIRST_IN_FLIGHT, InFlight
from batchrun.limits.outage import MANY_OUTAGE_ROWS, OUTAGE_ROWS
from batchrun.limits.refusals import Conclusion
from batchrun.records import RowError, Verdict

HOLD = Decision(hold=True)
PROCEED = Decision()
MAX_OUTAGE_S = 7_200.0


def error(http_status: int, kind: str = "", code: str | None = None) -> RowError:
    return RowError(kind or f"http_{http_status}", http_status, code, f"HTTP {http_status} {code or kind}".strip())


class Story:
    """A machine, its clock, and the attempts that are out, by row."""

    def __init__(
        self, *, max_in_flight: int = 64, resumed: bool = False, uniform: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.now_s = 0.0
        self.changes: list[tuple[Phase, Phase]] = []
        self.out: dict[int, int] = {}
        self.state = Circuit(
            in_flight=InFlight(max_in_flight),
            max_outage_s=MAX_OUTAGE_S,
            resumed=resumed,
            uniform=uniform,
            on_change=lambda before, after: self.changes.append((before, after)),
        )

    def phase(self) -> Phase:
        """A method, so that mypy takes it for what it is: different after every event."""
        return self.state.phase

    def send(self, *rows: int) -> None:
        for row in rows:
            assert self.state.binding(self.now_s) is None, f"row {row} is not admitted: {self.phase()}"
            self.out[row] = self.state.admit(self.now_s)

    def barred(self) -> bool:
        return self.state.binding(self.now_s) is not None

    def ends(
        self,
        row: int,
        verdict: Verdict,
        failure: RowError | None = None,
        retry_after_s: float | None = None,
        *,
        storm: bool = True,
        accepted: bool = False,
    ) -> Decision:
        """A refusal is one of a storm, after which nothing was accepted, unless the test says otherwise."""
        conclusion = Conclusion(storm=storm, accepted=accepted)
        outcome = Outcome(row, verdict, failure, retry_after_s)
        return self.state.observe(outcome, self.out.pop(row), self.now_s, conclusion)

    def until_s(self) -> float:
        phase = self.phase()
        assert isinstance(phase, Cooling)
        return phase.until_s

    def cooled_down(self) -> None:
        """The clock is where the cooling ends."""
        self.now_s = self.until_s()

    def all_well(self) -> None:
        """Some rows have succeeded, and the ramp has reached its end."""
        row = 10_000
        while self.state.in_flight.allowed < self.state.in_flight.most or not self.state.successes:
            wave = range(row, row := row + self.state.in_flight.allowed)
            self.send(*wave)
            for sent in wave:
                self.ends(sent, Verdict.OK)


SLOW_429 = error(429, "rate_limit")
SLOW_503 = error(503, "overloaded")
REFUSED_401 = error(401, "authentication")
EMPTY_402 = error(402, "insufficient_quota")
FORBIDDEN_403 = error(403, "forbidden")
MISSING_404 = error(404, "not_found")
BROKEN_500 = error(500, "server_error")
BAD_400 = error(400, "bad_request", "unknown_parameter")


# the ramp


def test_concurrency_starts_at_eight_and_doubles() -> None:
    story = Story()
    for in_flight in (8, 16, 32, 64, 64):
        assert story.state.in_flight.allowed == in_flight
        story.send(*range(in_flight))
        binding = story.state.binding(story.now_s)
        assert binding is not None
        assert binding.limit is Limit.IN_FLIGHT
        for row in range(in_flight):
            assert story.ends(row, Verdict.OK) == PROCEED


def test_fewer_than_eight_in_flight_stay_fewer() -> None:
    story = Story(max_in_flight=3)
    story.send(0, 1, 2)
    assert story.barred()
    story.ends(0, Verdict.OK)
    story.send(3)
    assert story.barred()


@pytest.mark.parametrize(
    ("verdict", "failure", "then"),
    [
        (Verdict.SLOW, SLOW_503, (45, 46, 47)),
        (Verdict.FREE, RowError("refused", None, None, "connection refused"), (45, 46, 47)),
        (Verdict.FREE, BROKEN_500, (64, 64)),
    ],
)
def test_after_trouble_concurrency_reopens_stepwise(verdict: Verdict, failure: RowError, then: tuple[int, ...]) -> None:
    """One, two, four, up to what worked before."""
    story = Story()
    story.all_well()
    troubled = range(100, 100 + MANY_OUTAGE_ROWS)
    story.send(*troubled)
    for row in troubled:
        story.ends(row, verdict, failure)
    story.cooled_down()
    row = 1_000
    for in_flight in (1, 2, 4, 8, 16, 32, *then):
        assert story.state.in_flight.allowed == in_flight
        wave = list(range(row, row := row + in_flight))
        story.send(*wave)
        assert story.barred()
        for sent in wave:
            story.ends(sent, Verdict.OK)


def test_a_429_lowers_rate_not_concurrency() -> None:
    story = Story()
    story.all_well()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_429)
    story.cooled_down()
    story.send(1)
    story.ends(1, Verdict.OK)
    assert story.state.in_flight.allowed == 64


def test_unused_concurrency_does_not_grow() -> None:
    story = Story()
    for row in range(500):
        story.send(row, row + 1_000)
        story.ends(row, Verdict.OK)
        story.ends(row + 1_000, Verdict.OK)
    assert story.state.in_flight.allowed == FIRST_IN_FLIGHT


def test_withdrawn_attempts_return_their_place() -> None:
    story = Story(max_in_flight=1)
    story.send(0)
    assert story.barred()
    story.state.withdraw(story.out.pop(0))
    story.send(1)


def test_a_probe_withdrawn_unsent_makes_room_for_another() -> None:
    story = Story()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_429)
    story.cooled_down()
    story.send(1)
    assert story.state.binding(story.now_s) == Binding(Limit.PROBING)
    story.state.withdraw(story.out.pop(1))
    story.send(2)
    story.ends(2, Verdict.OK)
    assert story.phase() is OPEN


# 429 and overload


def test_stragglers_do_not_extend_a_cooling() -> None:
    """A 429 cools for all rows."""
    story = Story()
    story.send(*range(8))
    story.ends(0, Verdict.SLOW, SLOW_429, retry_after_s=5.0)
    assert story.phase() == Cooling(5.0, "HTTP 429 rate_limit", "429")
    assert story.state.binding(story.now_s) == Binding(Limit.COOLING, 5.0, "429")
    story.now_s = 0.5
    for row in range(1, 5):
        story.ends(row, Verdict.SLOW, SLOW_429, retry_after_s=2.0)
    assert story.until_s() == 5.0
    story.now_s = 5.0
    story.send(100)
    for row in range(5, 8):
        story.ends(row, Verdict.SLOW, SLOW_429, retry_after_s=30.0)
    assert isinstance(story.phase(), Probing)
    story.ends(100, Verdict.OK)
    assert story.phase() is OPEN


def test_late_stragglers_start_no_new_cooling() -> None:
    story = Story()
    story.send(0, 1)
    story.ends(0, Verdict.SLOW, SLOW_429)
    story.cooled_down()
    story.send(2)
    story.ends(2, Verdict.OK)
    assert story.ends(1, Verdict.SLOW, SLOW_429, retry_after_s=60.0) == PROCEED
    assert story.phase() is OPEN


def test_a_longer_retry_after_extends_once() -> None:
    story = Story()
    story.send(0, 1, 2)
    story.ends(0, Verdict.SLOW, SLOW_429, retry_after_s=5.0)
    story.ends(1, Verdict.SLOW, SLOW_429, retry_after_s=20.0)
    assert story.until_s() == 20.0
    story.ends(2, Verdict.SLOW, SLOW_429, retry_after_s=40.0)
    assert story.until_s() == 20.0


def test_every_cooling_has_its_own_jitter() -> None:
    story = Story(uniform=lambda: 0.5)
    for row in (0, 2):
        story.send(row)
        story.ends(row, Verdict.OK)
        story.send(row, row + 1)
        story.ends(row, Verdict.SLOW, SLOW_429, retry_after_s=5.0)
        story.ends(row + 1, Verdict.SLOW, SLOW_429, retry_after_s=20.0)
        assert story.until_s() == story.now_s + 20.0 + 0.5 * JITTER
        story.cooled_down()


@given(st.floats(0, 0.999), st.floats(0, 900))
def test_a_retry_after_is_a_minimum(chance: float, retry_after_s: float) -> None:
    story = Story(uniform=lambda: chance)
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_429, retry_after_s=retry_after_s)
    assert retry_after_s <= story.until_s() <= max(1.0, retry_after_s) + JITTER


def test_failing_probes_back_off_one_by_one() -> None:
    """Up to a minute."""
    story = Story()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_429)
    waits = []
    for row in range(1, 9):
        waits.append(story.until_s() - story.now_s)
        story.cooled_down()
        story.send(row)
        assert story.barred()
        story.ends(row, Verdict.SLOW, SLOW_429)
    assert waits == [1, 2, 4, 8, 16, 32, BACKOFF_CAP_S, BACKOFF_CAP_S]


def test_jitter_grows_with_the_backoff() -> None:
    story = Story(uniform=lambda: 0.5)
    for row in range(9):
        story.send(row)
        story.ends(row, Verdict.SLOW, SLOW_429)
        waited_s = story.until_s() - story.now_s
        story.cooled_down()
    assert waited_s == BACKOFF_CAP_S * (1 + 0.5 * JITTER)


def test_a_success_makes_the_next_backoff_short_again() -> None:
    story = Story()
    for row in (0, 1, 2):
        story.send(row)
        story.ends(row, Verdict.SLOW, SLOW_429)
        story.cooled_down()
    story.send(3)
    story.ends(3, Verdict.OK)
    story.send(4)
    story.ends(4, Verdict.SLOW, SLOW_429)
    assert story.until_s() - story.now_s == 1.0


@pytest.mark.parametrize("failure", [SLOW_429, SLOW_503])
def test_one_refusal_stays_with_its_row(failure: RowError) -> None:
    story = Story()
    story.all_well()
    story.send(0)
    assert story.ends(0, Verdict.SLOW, failure, retry_after_s=30.0, storm=False) == PROCEED
    assert story.phase() is OPEN
    assert story.state.in_flight.allowed == 64


def test_an_overload_storm_cools_and_probes() -> None:
    """After it fewer requests are in flight."""
    story = Story()
    story.all_well()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_503, retry_after_s=9.0)
    assert story.phase() == Cooling(9.0, "HTTP 503 overloaded", "503")
    story.cooled_down()
    story.send(1)
    assert story.phase() == Probing("HTTP 503 overloaded")
    assert story.barred()
    story.ends(1, Verdict.ROW, BAD_400)
    assert story.phase() is OPEN
    assert story.state.in_flight.allowed < 64


def test_a_429_storm_resumes_at_once() -> None:
    """Where rows had been answered before."""
    story = Story()
    story.all_well()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_429, retry_after_s=9.0, accepted=True)
    assert story.phase() == Cooling(9.0, "HTTP 429 rate_limit", "429", probe=False)
    story.cooled_down()
    story.send(1, 2, 3)
    assert story.phase() is OPEN


# verdicts on the run

RUN_VERDICTS = [
    (Verdict.PAUSE, EMPTY_402, ExitCode.PAUSED),
    (Verdict.PAUSE, FORBIDDEN_403, ExitCode.PAUSED),
    (Verdict.STOP, MISSING_404, ExitCode.USAGE),
]


@pytest.mark.parametrize(("verdict", "failure", "exit_code"), RUN_VERDICTS)
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_later_row_confirms_a_fatal_error(
    verdict: Verdict, failure: RowError, exit_code: ExitCode, at_once: int
) -> None:
    """One that was sent with the first one does not. The run stops, and none of these rows is settled."""
    story = Story()
    story.all_well()
    story.send(*range(at_once))
    for row in range(at_once):
        assert story.ends(row, verdict, failure) == HOLD
    story.send(at_once)
    assert story.barred()
    assert story.ends(at_once, verdict, failure) == HOLD
    assert story.phase() == Stopped(Stop(exit_code, failure.message or ""))
    assert story.state.binding(story.now_s) == Binding(Limit.STOPPED)


@pytest.mark.parametrize(("verdict", "failure", "exit_code"), RUN_VERDICTS)
def test_an_unconfirmed_fatal_error_is_the_rows(verdict: Verdict, failure: RowError, exit_code: ExitCode) -> None:
    story = Story()
    story.all_well()
    story.send(0)
    assert story.ends(0, verdict, failure) == HOLD
    story.send(1)
    assert story.barred()
    assert story.ends(1, Verdict.OK) == Decision(own=(0,))
    assert story.phase() is OPEN
    assert story.state.in_flight.allowed == 64
    story.send(2)
    assert story.ends(2, Verdict.OK) == PROCEED


def test_each_disproof_asks_for_one_more_confirmation() -> None:
    """Where some rows are refused at random, a second refusal proves little."""
    story = Story()
    story.all_well()
    for disproved in range(6):
        story.send(10 * disproved, 10 * disproved + 1)
        story.ends(10 * disproved, Verdict.PAUSE, FORBIDDEN_403)
        if disproved:
            story.ends(10 * disproved + 1, Verdict.PAUSE, FORBIDDEN_403)  # sent before: confirms nothing
            assert isinstance(story.phase(), Probing)
        for row in range(min(disproved, 4)):
            story.send(1000 + row)
            story.ends(1000 + row, Verdict.PAUSE, FORBIDDEN_403)
        assert isinstance(story.phase(), Probing)
        story.send(2000)
        story.ends(2000, Verdict.OK)
        assert story.phase() is OPEN
    story.send(0)
    story.ends(0, Verdict.PAUSE, FORBIDDEN_403)
    for row in range(5):
        assert isinstance(story.phase(), Probing)
        story.send(3000 + row)
        story.ends(3000 + row, Verdict.PAUSE, FORBIDDEN_403)
    assert isinstance(story.phase(), Stopped)


def refused_in_a_row(story: Story, rows: range) -> None:
    """They are sent one by one, and each gets a 401."""
    for row in rows:
        story.send(row)
        assert story.ends(row, Verdict.PAUSE, REFUSED_401) == HOLD


def test_six_wrong_keys_in_a_row_stop() -> None:
    """One key of several may be bad, and a 401 costs nothing."""
    story = Story()
    story.all_well()
    refused_in_a_row(story, range(5))
    assert isinstance(story.phase(), Probing)
    refused_in_a_row(story, range(5, 6))
    assert story.phase() == Stopped(Stop(ExitCode.PAUSED, "HTTP 401 authentication"))


def test_wrong_keys_at_once_count_in_a_row() -> None:
    """A key that is refused everywhere costs no request beyond those in flight."""
    story = Story()
    story.send(*range(8))
    for row in range(8):
        assert isinstance(story.phase(), Probing if row else type(OPEN))
        assert story.ends(row, Verdict.PAUSE, REFUSED_401) == HOLD
    assert isinstance(story.phase(), Stopped)


def test_an_older_success_clears_no_suspicion() -> None:
    """An answer to a request that was sent before a key was revoked proves nothing."""
    story = Story()
    story.send(0, 1, 2)
    assert story.ends(2, Verdict.PAUSE, REFUSED_401) == HOLD
    assert story.ends(0, Verdict.OK) == PROCEED
    assert story.ends(1, Verdict.OK) == PROCEED
    assert isinstance(story.phase(), Probing)
    refused_in_a_row(story, range(3, 8))
    assert isinstance(story.phase(), Stopped)


def test_a_row_accepted_beside_it_disproves_the_verdict() -> None:
    """It was sent after it, with the same key: one of several is bad. From then on a refusal is its row's own."""
    story = Story()
    story.send(*range(8))
    assert story.ends(0, Verdict.PAUSE, REFUSED_401) == HOLD
    assert story.ends(1, Verdict.OK) == Decision(own=(0,))
    assert story.phase() is OPEN
    for row in range(2, 7):
        assert story.ends(row, Verdict.PAUSE, REFUSED_401) == Decision(hold=True, own=(row,))
    assert story.ends(7, Verdict.PAUSE, REFUSED_401) == HOLD, "so many without an answer between are the run's"
    assert isinstance(story.phase(), Probing)


def test_rows_in_flight_disprove_no_empty_account() -> None:
    """An account that runs out may still pay for small requests: the verdict is the run's, and no row fails by it."""
    story = Story()
    story.send(*range(8))
    assert story.ends(0, Verdict.PAUSE, EMPTY_402) == HOLD
    for row in range(1, 7):
        assert story.ends(row, Verdict.OK) == PROCEED
    story.send(8)
    assert story.ends(8, Verdict.PAUSE, EMPTY_402) == HOLD
    assert isinstance(story.phase(), Stopped), "at once, though row 7 is in flight"


@pytest.mark.parametrize("accepted", [True, False])
def test_a_wrong_key_waits_for_rows_in_flight(accepted: bool) -> None:
    """They may disprove it; no other row is sent meanwhile."""
    story = Story()
    story.send(*range(4))
    story.ends(0, Verdict.PAUSE, REFUSED_401)
    refused_in_a_row(story, range(4, 9))
    assert isinstance(story.phase(), Probing)
    assert story.barred()
    if accepted:
        assert story.ends(1, Verdict.OK) == Decision(own=(0, 4, 5, 6, 7, 8))
        assert story.phase() is OPEN
        return
    for row in (1, 2, 3):
        assert isinstance(story.phase(), Probing)
        story.ends(row, Verdict.PAUSE, REFUSED_401)
    assert isinstance(story.phase(), Stopped)


def test_a_withdrawn_row_keeps_no_stop_waiting() -> None:
    """Nothing is heard of an attempt that was never sent."""
    story = Story()
    story.send(0, 1)
    story.ends(0, Verdict.PAUSE, REFUSED_401)
    refused_in_a_row(story, range(2, 7))
    story.state.withdraw(story.out.pop(1))
    assert isinstance(story.phase(), Stopped)


@pytest.mark.parametrize(("failure", "times"), [(EMPTY_402, 2), (REFUSED_401, 6)])
def test_a_lone_row_is_sent_again_first(failure: RowError, times: int) -> None:
    story = Story(resumed=True)
    for _ in range(times):
        story.send(0)
        assert story.ends(0, Verdict.PAUSE, failure) == HOLD
    assert story.phase() == Stopped(Stop(ExitCode.PAUSED, failure.message or ""))


def test_a_probes_own_verdict_is_probed_next() -> None:
    """While an outage is probed, the first verdict on the run is that of a probe."""
    story = Story()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_503)
    story.cooled_down()
    for row in (1, 2):
        story.send(row)
        assert story.ends(row, Verdict.PAUSE, EMPTY_402) == HOLD
    assert isinstance(story.phase(), Stopped)


def test_a_lone_rows_second_success_clears() -> None:
    story = Story()
    story.send(0)
    story.ends(0, Verdict.PAUSE, REFUSED_401)
    story.send(0)
    assert story.ends(0, Verdict.OK) == PROCEED
    assert story.phase() is OPEN


def test_different_verdicts_do_not_confirm() -> None:
    story = Story()
    story.send(0, 1)
    story.ends(0, Verdict.PAUSE, FORBIDDEN_403)
    story.ends(1, Verdict.STOP, MISSING_404)
    assert isinstance(story.phase(), Probing)
    story.send(2)
    assert story.ends(2, Verdict.OK) == Decision(own=(0, 1))


def test_an_early_probe_clears_one_suspect() -> None:
    story = Story()
    story.send(0, 1)
    story.ends(0, Verdict.PAUSE, FORBIDDEN_403)
    story.send(2)
    story.ends(1, Verdict.STOP, MISSING_404)
    assert story.ends(2, Verdict.OK) == Decision(own=(0,))
    assert isinstance(story.phase(), Probing)
    story.send(3)
    assert story.ends(3, Verdict.OK) == Decision(own=(1,))
    assert story.phase() is OPEN


def test_a_refused_probe_decides_nothing() -> None:
    story = Story()
    story.send(0)
    story.ends(0, Verdict.PAUSE, FORBIDDEN_403)
    story.send(1)
    assert story.ends(1, Verdict.ROW, BAD_400) == PROCEED
    assert isinstance(story.phase(), Probing)
    story.send(2)
    assert story.ends(2, Verdict.OK) == Decision(own=(0,))


def test_suspicion_outlives_an_unanswered_probe() -> None:
    story = Story()
    story.send(0)
    story.ends(0, Verdict.PAUSE, EMPTY_402)
    story.send(1)
    story.ends(1, Verdict.FREE, BROKEN_500)
    story.cooled_down()
    story.send(2)
    story.ends(2, Verdict.PAUSE, EMPTY_402)
    assert isinstance(story.phase(), Stopped)


def test_a_fatal_error_in_cooling_waits() -> None:
    story = Story()
    story.send(0, 1)
    story.ends(0, Verdict.SLOW, SLOW_429)
    assert story.ends(1, Verdict.PAUSE, FORBIDDEN_403) == HOLD
    assert isinstance(story.phase(), Cooling)
    story.cooled_down()
    story.send(2)
    assert story.ends(2, Verdict.OK) == Decision(own=(1,))


# outage


def test_five_unanswered_rows_are_an_outage() -> None:
    story = Story()
    story.send(*range(8))
    for row in range(OUTAGE_ROWS - 1):
        story.ends(row, Verdict.FREE, BROKEN_500)
    assert story.phase() is OPEN
    story.ends(OUTAGE_ROWS - 1, Verdict.MAYBE, BROKEN_500)
    assert story.phase() == Cooling(1.0, "the endpoint is not answering: HTTP 500 server_error", "500")
    story.ends(6, Verdict.FREE, BROKEN_500)
    assert story.until_s() == 1.0


def test_one_row_failing_often_is_no_outage() -> None:
    story = Story()
    for _ in range(10):
        story.send(0)
        story.ends(0, Verdict.FREE, BROKEN_500)
    assert story.phase() is OPEN


@pytest.mark.parametrize("answer", [Verdict.OK, Verdict.ROW])
def test_an_answer_between_failures_is_no_outage(answer: Verdict) -> None:
    story = Story()
    for row in range(0, 100, 2):
        story.send(row)
        story.ends(row, Verdict.FREE, BROKEN_500)
        if row % 6 == 0:
            story.send(row + 1)
            story.ends(row + 1, answer, error(400, code=str(row)))
    assert story.phase() is OPEN


def test_high_concurrency_needs_eight_failures() -> None:
    story = Story()
    story.all_well()
    story.send(*range(64))
    for row in range(MANY_OUTAGE_ROWS - 1):
        story.ends(row, Verdict.FREE, BROKEN_500)
    assert story.phase() is OPEN
    story.ends(MANY_OUTAGE_ROWS - 1, Verdict.FREE, BROKEN_500)
    assert isinstance(story.phase(), Cooling)


def test_any_answered_probe_ends_the_outage() -> None:
    """Even a refusal."""
    story = Story()
    story.send(*range(8))
    for row in range(8):
        story.ends(row, Verdict.FREE, BROKEN_500)
    story.cooled_down()
    story.send(9)
    story.ends(9, Verdict.ROW, BAD_400)
    assert story.phase() is OPEN


@pytest.mark.parametrize(
    ("verdict", "failure"),
    [(Verdict.FREE, BROKEN_500), (Verdict.MAYBE, None), (Verdict.SLOW, SLOW_429), (Verdict.SLOW, SLOW_503)],
)
@pytest.mark.parametrize("chance", [0.0, 0.999])
def test_ten_minutes_of_trouble_need_few_requests(verdict: Verdict, failure: RowError | None, chance: float) -> None:
    story = Story(uniform=lambda: chance)
    sent = 0
    while story.now_s < 600:
        while not story.barred():
            story.send(sent)
            sent += 1
        for row in list(story.out)[:1]:
            story.now_s += 0.05
            story.ends(row, verdict, failure)
        if not story.out:
            story.cooled_down()
    assert sent < 30


def test_a_too_long_outage_pauses() -> None:
    story = Story()
    row = 0
    while not isinstance(story.phase(), Stopped):
        while not story.barred():
            story.send(row := row + 1)
        for failed in list(story.out):
            story.ends(failed, Verdict.FREE, BROKEN_500)
        if isinstance(story.phase(), Cooling):
            story.cooled_down()
    assert story.state.stop == Stop(ExitCode.PAUSED, "no answer for 120 minutes: HTTP 500 server_error")
    assert MAX_OUTAGE_S < story.now_s <= MAX_OUTAGE_S + BACKOFF_CAP_S


def sent_until_stopped(story: Story, verdict: Verdict, failure: RowError) -> int:
    """How many rows were sent until the run stopped, where each of them ends like this."""
    row = 0
    while not isinstance(story.phase(), Stopped):
        if story.barred():
            story.now_s += 1
            continue
        story.send(row)
        story.ends(row, verdict, failure)
        row += 1
    return row


@pytest.mark.parametrize(("heard", "patience_s"), [(False, FIRST_REACH_S), (True, MAX_OUTAGE_S)])
def test_a_never_reached_endpoint_waits_less(heard: bool, patience_s: float) -> None:
    story = Story()
    if heard:
        story.send(99)
        story.ends(99, Verdict.FREE, error(500))
    nowhere = RowError("dns", None, None, "no such host")
    rows = sent_until_stopped(story, Verdict.FREE, nowhere)
    assert patience_s < story.now_s <= patience_s + BACKOFF_CAP_S * (1 + JITTER)
    assert story.state.stop is not None
    assert story.state.stop.exit_code is ExitCode.PAUSED
    assert ("never reached" in story.state.stop.why) is not heard
    assert rows < 200


OTHER_API_200 = RowError("other_api", 200, None, "the answer comes from another API")


def test_two_answers_of_another_api_stop_runs() -> None:
    """After the first one row is sent, whoever else is in flight."""
    story = Story()
    story.send(0, 1, 2)
    story.ends(0, Verdict.MAYBE, OTHER_API_200)
    assert isinstance(story.phase(), Probing)
    story.send(3)
    assert story.barred()
    story.ends(1, Verdict.MAYBE, OTHER_API_200)
    assert story.phase() == Stopped(Stop(ExitCode.USAGE, "HTTP 200: the answer comes from another API"))


def test_a_good_answer_clears_the_suspicion() -> None:
    story = Story()
    story.send(0)
    story.ends(0, Verdict.MAYBE, OTHER_API_200)
    story.send(1)
    story.ends(1, Verdict.OK)
    assert story.phase() is OPEN
    story.send(2, 3)
    for row in (2, 3):
        story.ends(row, Verdict.MAYBE, OTHER_API_200)
    assert story.phase() is OPEN, "an answer came before, so the address is right"


@pytest.mark.parametrize("kind", ["unreadable", "bad_encoding", "malformed_http"])
@pytest.mark.parametrize(("answered", "patience_s"), [(False, FIRST_ANSWER_S), (True, MAX_OUTAGE_S)])
def test_an_endpoint_without_completions_is_left_soon(answered: bool, patience_s: float, kind: str) -> None:
    """A login page is an answer, too, and never becomes one of a model. Each may be billed."""
    story = Story()
    if answered:
        story.send(10_000)
        story.ends(10_000, Verdict.OK)
    page = RowError(kind, 200, None, "the answer is not a chat completion: <html>")
    rows = sent_until_stopped(story, Verdict.MAYBE, page)
    assert patience_s < story.now_s <= patience_s + BACKOFF_CAP_S * (1 + JITTER)
    assert story.state.stop is not None
    assert story.state.stop.exit_code is ExitCode.PAUSED
    assert answered or rows < 20


def test_an_answer_restarts_the_outage_clock() -> None:
    story = Story()
    for hour in range(10):
        story.now_s = hour * 3_600.0
        story.send(0)
        story.ends(0, Verdict.FREE, BROKEN_500)
        story.send(1)
        story.ends(1, Verdict.OK)
    assert story.phase() is OPEN


def test_successes_decide_whether_failures_count() -> None:
    story = Story()
    story.send(0, 1)
    before = story.state.successes
    story.ends(0, Verdict.FREE, BROKEN_500)
    assert story.state.successes == before
    story.ends(1, Verdict.OK)
    assert story.state.successes == before + 1


# the first ten rows


def first_rows(story: Story, *failures: RowError | None) -> None:
    for row, failure in enumerate(failures):
        story.send(row)
        story.ends(row, Verdict.OK if failure is None else Verdict.ROW, failure)


def test_ten_equal_first_failures_stop_the_run() -> None:
    story = Story()
    first_rows(story, *[BAD_400] * (ALIKE_ROWS - 1))
    assert story.phase() is OPEN
    assert story.state.in_flight.allowed == FIRST_IN_FLIGHT
    story.send(9)
    assert story.ends(9, Verdict.ROW, BAD_400) == PROCEED
    assert story.state.stop == Stop(ExitCode.USAGE, "the first 10 rows all failed alike: HTTP 400 unknown_parameter")


@pytest.mark.parametrize("position", range(ALIKE_ROWS))
@pytest.mark.parametrize("other", [None, error(400, "bad_request", "context_length")])
def test_one_different_first_row_continues(position: int, other: RowError | None) -> None:
    story = Story()
    failures: list[RowError | None] = [BAD_400] * ALIKE_ROWS
    failures[position] = other
    first_rows(story, *failures, *[BAD_400] * 50)
    assert story.phase() is OPEN


def test_ten_blocked_first_rows_continue() -> None:
    story = Story()
    first_rows(story, *[error(503, "content_policy")] * 20)
    assert story.phase() is OPEN


def test_a_resumed_run_skips_the_first_rows_check() -> None:
    story = Story(resumed=True)
    first_rows(story, *[BAD_400] * 50)
    assert story.phase() is OPEN


# the machine as a whole


def test_the_first_reason_to_stop_stays_the_reason() -> None:
    story = Story()
    story.state.close(Stop(ExitCode.SIGINT, "interrupted"))
    story.state.close(Stop(ExitCode.SIGTERM, "terminated"))
    assert story.state.stop == Stop(ExitCode.SIGINT, "interrupted")
    assert story.changes == [(OPEN, Stopped(Stop(ExitCode.SIGINT, "interrupted")))]


def test_every_change_is_reported_with_before() -> None:
    story = Story()
    story.send(0)
    story.ends(0, Verdict.SLOW, SLOW_429)
    story.cooled_down()
    story.send(1)
    story.ends(1, Verdict.OK)
    cooling, probing = Cooling(1.0, "HTTP 429 rate_limit", "429"), Probing("HTTP 429 rate_limit")
    assert story.changes == [(OPEN, cooling), (cooling, probing), (probing, OPEN)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 7),
            st.sampled_from(list(Verdict)),
            st.sampled_from([None, SLOW_429, SLOW_503, BROKEN_500]),
            st.none() | st.floats(0, 100),
        ),
        max_size=120,
    )
)
def test_the_gate_never_forgets_a_held_row(
    events: list[tuple[int, Verdict, RowError | None, float | None]],
) -> None:
    """Whatever happens, the gate is stopped or admits again."""
    story = Story(max_in_flight=8)
    held: set[int] = set()
    row = 0
    for pick, verdict, failure, retry_after_s in events:
        while not story.barred() and len(story.out) < 8:
            story.send(row := row + 1)
        if story.out:
            ended = list(story.out)[pick % len(story.out)]
            decision = story.ends(ended, verdict, failure, retry_after_s)
            assert held.issuperset(decision.own)
            held = held.difference(decision.own) | ({ended} if decision.hold else set())
        elif isinstance(story.phase(), Cooling):
            story.cooled_down()
    if isinstance(story.phase(), Stopped):
        return
    for out in list(story.out):
        held = held.difference(story.ends(out, Verdict.OK).own)
    if isinstance(story.phase(), Cooling):
        story.cooled_down()
    story.send(row + 1)
    held = held.difference(story.ends(row + 1, Verdict.OK).own)
    assert (held, story.phase()) == (set(), OPEN)
