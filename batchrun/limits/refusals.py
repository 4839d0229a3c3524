"""Explains refusals (a rate limit, crowding, or chance) and adjusts rate and requests in flight accordingly. PURE.

A refused row always waits its own time and is sent again; random refusals need no more than that. The rest needs
evidence:

- **A storm**: nearly everything is refused. A bucket is empty, and the gate pauses; unless refused requests had more
  others in flight than accepted ones: then fewer in flight are tried first (`crowding`).
- **An excess**: at a learned rate, more is refused than in ordinary times. The rate is lowered (`rate_search`).
- **A share that stays** after the rate was lowered is chance, and the earlier rate is restored.
- **A share without a storm** may still be a limit slightly exceeded: now and then the gate goes slower on purpose, to
  see whether refusals end.

TCP's history is the reason: loss-driven AIMD collapses under random loss, and control by delivered rate does not (BBR,
Cardwell et al. 2016; PCC Vivace, Dong et al. 2018).
"""

import math
from collections.abc import Callable, Mapping

import msgspec

from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import Limit
from batchrun.limits.crowding import REMEMBERED
from batchrun.limits.evidence import RefusedShare, SendLog, Sent, SequentialTest
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rate_search import RateSearch
from batchrun.limits.refusal_runs import RefusalRuns

STORM_BAR = 10.9
LEAST_ORDINARY, LEAST_ORDINARY_KNOWN, MOST_ORDINARY = 0.2, 0.1, 0.5
MAX_ORDINARY = 0.8
STORM_SHARE, STORM_ABOVE = 0.6, 0.3
"""A storm is 60 % refused or more, or 30 % above the ordinary share. That share is assumed to be at least 20 %, so that
ten in a row are a storm and chance hardly ever is; or 10 %, seven in a row, if a limit or crowding is likely."""

MUCH_BY_CHANCE, SURER = 0.1, 1.4
"""Where such a share is refused in ordinary times, that bar is higher by this factor: the share is chance, because a
limit refuses little below its rate, and would look like a storm once in 50,000 requests."""

EXCESS_BAR = 4.0
LEAST_SHARE = 0.003
EXCESS_ABOVE = 0.04
"""At a learned rate, three refusals in a hundred are an excess if none is ordinary: a false alarm costs 2 %. Above a
limit that was measured they are expected, and one is enough."""

MOST = 0.99
"""A share of one would have no logarithm."""

TRIAL_ORDINARY, TRIAL_ABOVE = 0.05, 0.1
NONE_TAKEN = 3
"""After a storm, this many refusals with nothing accepted are the next storm."""

SLOWER = 0.93
"""A trial's rate is this share of what the limit would be, if it was one: the rate so far, less the refused share."""

LEAST_DOUBTED = 0.03
"""A smaller share is not worth a trial: if it is a limit, it costs that share of requests, and no money."""

EXPECTED, MOST_EXPECTED = 6, 10
HELPED_SHARE = 0.2
HELPED_BAR, NOT_HELPED_BAR = 4.6, 2.0
"""A trial begins once six refusals are counted. It helped if a fifth of them or fewer are left, and so few would occur
by chance once in a hundred trials (e^-4.6)."""

ADD_UP_EVERY_S = 0.02
"""How often accepted attempts are counted in quiet times."""

WORTH_A_WORD = 0.005
"""A smaller refused share is not reported."""

TRY_AGAIN_S = 60.0
TRY_AGAIN_TIMES = 20
"""After a minute, doubled each time, and at most a twentieth of the time: a trial costs a fifth of the rate."""


class Conclusion(msgspec.Struct, frozen=True):
    """`storm`: the gate must pause. `accepted`: something was accepted since the last pause."""

    storm: bool = False
    accepted: bool = True


NOTHING = Conclusion()


class _SlowTrial(msgspec.Struct):
    """A trial of going slower on purpose."""

    started_s: float
    share: float
    per_s: float
    least: float
    """What the share is at least, since it rests on a few refusals."""
    count: int = 0
    refused: int = 0
    evidence: float = 0.0


class Refusals:
    """Watches every attempt, and adjusts the learned rates and the requests in flight. One per gate."""

    def __init__(
        self,
        rates: Mapping[Limit, AdaptiveRate],
        in_flight: InFlight,
        on_cause: Callable[[str, str], None] = lambda cause, why: None,
    ) -> None:
        """`rates` of requests and tokens. `on_cause` is called with the cause of refusals (a limit, crowding, chance)
        when there is evidence for it, and with that evidence in words.
        """
        self.searches = {limit: RateSearch(rate) for limit, rate in rates.items()}
        self._requests, self._tokens = self.searches[Limit.REQUESTS], self.searches[Limit.TOKENS]
        self._rates = rates
        self._crowding = in_flight.crowding
        self._in_flight = in_flight
        self._on_cause = on_cause
        self.out = 0  # attempts that are sent and not ended
        self.share = RefusedShare()
        self._log = SendLog()
        self._storm = SequentialTest(STORM_BAR, self._ordinary)
        self._excess = SequentialTest(EXCESS_BAR)
        self._runs = RefusalRuns()
        self._since = 0  # attempts of a lower order were sent before the last change, and are no evidence about it
        self._accepted = True  # something was, since the last pause
        self._limit = Limit.REQUESTS  # the one that the last refusal named
        self._names_time = False  # it also named a time to come back
        self._trial: _SlowTrial | None = None
        self._next_trial_s = 0.0
        self._trial_wait_s = TRY_AGAIN_S
        self._is_storm = False
        self._conclusion = NOTHING  # for the next `refused` to return: a storm may be found when an answer is counted
        self._may_add_up = False  # in quiet times accepted attempts are counted together, now and then
        self._add_up_from_s = 0.0

    @property
    def in_words(self) -> str | None:
        """The present explanation of refusals; None if hardly anything is refused."""
        if self._crowding.cap is not None:
            return "more at once are refused"
        if any(search.per_s is not None for search in self.searches.values()):
            return "a limit learned from refusals"
        share = float(self.share)
        return f"{share:.1%} refused by chance" if self.share.is_known and share >= WORTH_A_WORD else None

    @property
    def is_searching(self) -> bool:
        """True while each accepted attempt may raise a rate."""
        return self._requests.is_searching or self._tokens.is_searching

    def sent(self, now_s: float, tokens: int) -> None:
        """Adds an attempt. To be called for every one, in order."""
        self._log.sent(now_s, self.out, tokens)
        self.out += 1

    def ended(self, order: int, now_s: float, *, reached: bool = True) -> None:
        """The attempt was not refused: it was answered, failed otherwise, or (not `reached`) was never sent."""
        self.out -= 1
        self._log.ended(order, now_s, refused=False, counts=reached)
        if not self._may_add_up or now_s >= self._add_up_from_s:
            self._judge(now_s)

    def refused(self, order: int, now_s: float, limit: Limit, *, names_time: bool, empty: bool = False) -> Conclusion:
        """The attempt was refused by `limit`, as far as the server says; `names_time` if it named a time to come back.

        `empty`: its headers show an empty bucket.
        """
        self.out -= 1
        self._log.ended(order, now_s, refused=True)
        if order >= self._since:
            self._limit, self._names_time = limit, names_time
        if empty and order >= self._since:
            self._may_add_up = False
            self._pause(now_s, now_s, lone=True)
        else:
            self._judge(now_s)
        conclusion, self._conclusion = self._conclusion, NOTHING
        return conclusion

    def correct(self, tokens: float) -> None:
        """An attempt used this many more tokens than its estimate."""
        self._tokens.measured.correct(tokens)

    def rise(self, now_s: float) -> None:
        """Tries higher learned rates when it is time."""
        if self._trial is None and not self._may_add_up:  # in quiet times nothing is learned
            if self.is_searching:
                self._judge(now_s)
            share = float(self.share)
            for search in self.searches.values():
                if search.rise(now_s, share) and (seen := search.share_below(share)) is not None:
                    self.share.set(*seen)  # no more than this can be by chance, which refuses at any rate

    def reopened(self, now_s: float) -> None:
        """The gate's pause is over."""
        self.searches[self._limit].reopened(now_s)

    def _judge(self, now_s: float) -> None:
        """Counts every attempt of which it is now known whether it was accepted."""
        known = self._log.known(now_s)
        if known and self._may_add_up and not any(attempt.refused for _, attempt in known):
            # in quiet times an accepted attempt changes nothing by itself, so all are counted at once
            last = known[-1][1]
            self._requests.measured.accepted(last.at_s, len(known), len(known))
            self._tokens.measured.accepted(last.at_s, sum([attempt.tokens for _, attempt in known]), len(known))
            self._crowding.remember(now_s, [attempt.others for _, attempt in known[-REMEMBERED:]])
            evidence = sum([order >= self._since for order, _ in known])
            self._accepted |= evidence > 0
            self.share.add(0, evidence)
        else:
            for order, attempt in known:
                self._count(order, attempt, now_s)
        self._may_add_up = self._is_quiet and not (self._runs.in_a_row or self._runs.is_found)
        self._add_up_from_s = now_s + ADD_UP_EVERY_S

    def _count(self, order: int, attempt: Sent, now_s: float) -> None:
        """Counts an attempt, in the order of sending, once it is known whether it was accepted."""
        refused = bool(attempt.refused)
        self._requests.count(attempt.at_s, 1, refused=refused)
        self._tokens.count(attempt.at_s, attempt.tokens, refused=refused)
        if refused or self._runs.in_a_row or self._runs.is_found:
            self._runs.count(attempt.at_s, refused=refused)
        if not refused and self._is_quiet:
            self._crowding.accepted(now_s, attempt.at_s, attempt.others, self._in_flight.most, float(self.share))
            if order >= self._since:
                self._accepted = True
                self.share.add(0, 1)
            return
        if refused and self._crowding.refused(now_s, attempt.at_s, attempt.others, float(self.share)):
            return
        most, share = self._in_flight.most, float(self.share)
        if not refused and self._crowding.accepted(now_s, attempt.at_s, attempt.others, most, share):
            self._requests.space_out(attempt.at_s, now_s)
            self._on_cause("limit", "as many were accepted one by one")
            self._start_again()
            return
        if order < self._since:
            return
        self._accepted |= not refused
        if self._is_too_much(attempt.at_s, refused=refused):
            self._respond(attempt.at_s, now_s)
        elif self._trial is not None:
            self._count_in_trial(self._trial, now_s, refused=refused)
        elif not refused:
            self._begin_trial(attempt.at_s, now_s)

    @property
    def _is_quiet(self) -> bool:
        """True while nothing is suspected, learned or on trial: an accepted attempt then changes nothing."""
        if self._storm.level or self._trial is not None or float(self.share) >= LEAST_DOUBTED:
            return False
        learned = self._requests.per_s is not None or self._tokens.per_s is not None
        return not learned and self._crowding.cap is None and not self._crowding.on_trial

    def _is_too_much(self, at_s: float, *, refused: bool) -> bool:
        """True if this attempt completes a storm, or an excess at a learned rate."""
        share = float(self.share)
        # a lower share is enough if a limit is known, or crowding likely because no time to come back was named
        knows_limit = any(rate.configured is not None or rate.stated is not None for rate in self._rates.values())
        least = LEAST_ORDINARY_KNOWN if knows_limit or not self._names_time else LEAST_ORDINARY
        ordinary = min(MOST_ORDINARY, max(least, share))
        patience = self._runs.patience * (SURER if share >= MUCH_BY_CHANCE else 1.0)
        storm = self._storm.step(ordinary, max(STORM_SHARE, ordinary + STORM_ABOVE), refused=refused, times=patience)
        self._is_storm = storm or (refused and not self._accepted and self._storm.refused >= NONE_TAKEN)
        ordinary = min(MAX_ORDINARY, max(LEAST_SHARE, self._runs.ordinary(share)))
        excess = False
        if self._crowding.on_trial:
            ordinary = max(TRIAL_ORDINARY, ordinary)
            excess = self._excess.step(ordinary, max(STORM_SHARE, ordinary + TRIAL_ABOVE), refused=refused)
        elif self.searches[self._limit].per_s is not None and not self._runs.is_one:
            search = self.searches[self._limit]
            above = search.excess(at_s)
            much = ordinary + max(EXCESS_ABOVE, above)
            excess = self._excess.step(ordinary, min(MOST, much), refused=refused, times=search.needed(at_s))
        return self._is_storm or excess

    def _respond(self, at_s: float, now_s: float) -> None:
        """Too much is refused: the causes are tried in this order, and the first that fits is acted on."""
        search = self.searches[self._limit]
        if self._crowding.cap is not None:
            if self._crowding.doubt(now_s):
                self._start_again()
            else:
                self._pause(at_s, now_s)
        elif self._is_storm and not self._names_time and self._crowding.suspect(now_s, self._storm.refused):
            for each in self.searches.values():
                each.drop(now_s, "fewer in flight instead")
            self._on_cause("crowding", f"at most {self._crowding.cap} in flight")
            self._start_again()
        elif search.is_chance(at_s, now_s, self.share):
            self._next_trial_s = now_s + self._trial_wait_s  # this counts as a trial of going slower
            self._runs.is_chance(now_s)
            self._on_cause("chance", f"{float(self.share):.1%} are refused at any rate")
            if search.per_s is None:
                self._in_flight.unleash(self.out)
            self._start_again()
        elif self._is_storm:
            self._pause(at_s, now_s)
        elif self._rate_is_no_cause(search, at_s, now_s):
            self._start_again()
        elif search.exceeded(at_s, now_s, float(self.share), by_chance=self._runs.are_single):
            self._runs.is_handled = True
            self._on_cause("limit", "more was refused than in ordinary times")
            self._start_again()
        else:
            self._excess.clear()

    def _pause(self, at_s: float, now_s: float, *, lone: bool = False) -> None:
        """The gate pauses, and the rate is lowered if it may be the cause; `lone`: after one refusal that says so."""
        self._conclusion = Conclusion(storm=True, accepted=self._accepted)
        search = self.searches[self._limit]
        if not lone and self._rate_is_no_cause(search, at_s, now_s):
            pass
        elif lone or not self._runs.is_handled:
            search.storm(at_s, now_s, lone=lone, keep=self._runs.is_found)
            self._runs.is_handled = True
        self._on_cause("limit", "an empty bucket" if lone else "nearly everything was refused")
        self._accepted = False
        self._start_again()

    def _rate_is_no_cause(self, search: RateSearch, at_s: float, now_s: float) -> bool:
        """True if this was just shown, and the earlier rate is restored."""
        if not self._runs.lowered(now_s, search.per_s, search.shown(at_s)):
            return False
        search.restore(self._runs.before, now_s, "refusals come in runs, slower or not")
        self._on_cause("chance", "refusals come in runs, slower or not")
        return True

    def _start_again(self) -> None:
        """What was sent before a change is no evidence about it."""
        self._storm.clear()
        self._excess.clear()
        self._trial = None
        self._since = self._log.next_order

    def _ordinary(self, refused: int, count: int) -> None:
        """An excursion ended without a storm: its refusals were random, if no other cause is possible."""
        if self._trial is None and all(search.is_settled for search in self.searches.values()):
            self.share.add(refused, count)

    def _begin_trial(self, at_s: float, now_s: float) -> None:
        """Goes slower on purpose, if a share is refused without a storm and nothing else explains it."""
        if self._runs.is_found:
            return  # a trial of a hundred requests may fall between two runs
        share, free = float(self.share), all(rate.per_minute is None for rate in self._rates.values())
        if share < LEAST_DOUBTED or not free or self._crowding.cap is not None or now_s < self._next_trial_s:
            return
        per_s = self._requests.measured.delivered.lately(at_s)
        if per_s is None or self.share.refused < EXPECTED or self._storm.level >= STORM_BAR / 3:
            return
        self._trial = _SlowTrial(now_s, share, per_s, share * (1 - 1 / math.sqrt(self.share.refused)))
        slower = SLOWER * (1 - share) * per_s * 60
        self._rates[Limit.REQUESTS].learn(slower, now_s, "slower on purpose: do refusals end?")
        self._rates[Limit.REQUESTS].stand_at(0.0, now_s)
        self._since = self._log.next_order

    def _count_in_trial(self, trial: _SlowTrial, now_s: float, *, refused: bool) -> None:
        """A sequential test (Wald): is as much refused as before, or a fifth of it?"""
        trial.count += 1
        trial.refused += refused
        fewer = HELPED_SHARE * trial.least
        trial.evidence += math.log(HELPED_SHARE if refused else (1 - fewer) / (1 - trial.least))
        if -NOT_HELPED_BAR < trial.evidence < HELPED_BAR and trial.count < MOST_EXPECTED / trial.share:
            return
        self._trial = None
        if trial.evidence >= HELPED_BAR:
            self._requests.slower_helped(trial.per_s, now_s)
            self.share.set(trial.refused / trial.count, trial.count)
            self._on_cause("limit", "slower on purpose ended the refusals")
        else:
            self._requests.drop(now_s, "slower did not help")
            self._in_flight.unleash(self.out)
            self._trial_wait_s = max(2 * self._trial_wait_s, TRY_AGAIN_TIMES * (now_s - trial.started_s))
            self._next_trial_s = now_s + self._trial_wait_s
            self._on_cause("chance", f"{trial.share:.1%} are refused, slower or not")
        self._start_again()
