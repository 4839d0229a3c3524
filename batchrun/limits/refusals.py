"""What refusals are evidence of: a limit, crowding, or chance; and what follows for rate and number in flight. PURE.

A refused row always waits its own time and is sent again; that is all that chance needs. More happens on evidence only:

- **A storm**: of what is sent, nearly all is refused. Somebody's bucket is empty, and the gate pauses; unless what was
  refused was sent with more in flight than what was taken: then fewer in flight are tried first (`crowding`).
- **An excess**: at a learned rate, more is refused than in ordinary times. The rate is lowered (`rate_search`).
- **A share that stays** though the rate was lowered is chance, and the rate before is restored.
- **A share without a storm** may still be a limit, met by a little: now and then the gate goes slower on purpose, and
  looks whether refusals end.

TCP learned the same: a controller that takes each loss for congestion collapses under losses by chance, and one that
goes by what is delivered does not (BBR, Cardwell et al. 2016; PCC Vivace, Dong et al. 2018).
"""

import math
from collections.abc import Callable, Mapping

import msgspec

from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import Limit
from batchrun.limits.evidence import Sent, Share, Trail, Walk
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rate_search import RateSearch, Step
from batchrun.limits.refusal_runs import Runs

STORM_BAR = 10.9
LEAST_ORDINARY, LEAST_ORDINARY_KNOWN, MOST_ORDINARY = 0.2, 0.1, 0.5
MAX_ORDINARY = 0.8
STORM_SHARE, STORM_ABOVE = 0.6, 0.3
"""A storm is 60 % refused and more, or 30 % above the ordinary share. That is taken for no less than 20 %, so that ten
in a row are a storm and chance hardly ever is; or 10 %, seven in a row, where a limit or a number is likely."""

EXCESS_BAR = 4.0
LEAST_SHARE = 0.003
EXCESS_ABOVE = 0.04
"""At a learned rate, three refusals in a hundred are an excess where none is ordinary: a false alarm costs 2 %."""

TRIAL_ORDINARY, TRIAL_ABOVE = 0.05, 0.1
LEAST_REFUSED, LEAST_OVERLAP = 10, 0.1
NONE_TAKEN = 3
"""After a storm, so many refusals and nothing taken are the next one."""

SLOWER = 0.8
LEAST_DOUBTED = 0.03
"""A smaller share is not worth the trial: if it is a limit, what it costs is that share of requests, and no money."""

EXPECTED = 6
LEAST_TRIED = 30
HELPED = 0.005
HELPED_SHARE = 1 / 3
"""The trial lasts until six refusals are expected. It helped where there are a third of them or fewer, and so few would
come by chance once in two hundred trials."""

WORTH_A_WORD = 0.005
"""A smaller share of refusals is not mentioned."""

TRY_AGAIN_S = 60.0
TRY_AGAIN_TIMES = 20
"""After a minute, twice as long each time, and never more than a twentieth of the time: a trial costs a fifth of it."""


class Finding(msgspec.Struct, frozen=True):
    """`storm`: the gate must pause. `taken`: something was taken since the last pause."""

    storm: bool = False
    taken: bool = True


NOTHING = Finding()


class _Slower(msgspec.Struct):
    """A trial of going slower on purpose."""

    begun_s: float
    share: float
    per_s: float
    count: int = 0
    refused: int = 0


class Refusals:
    """Watches every attempt, and moves the learned rates and the number in flight. One per gate."""

    def __init__(
        self,
        paces: Mapping[Limit, AdaptiveRate],
        in_flight: InFlight,
        on_kind: Callable[[str, str], None] = lambda kind, why: None,
    ) -> None:
        """`paces` of requests and tokens; `on_kind` is told what refusals are taken for, and why."""
        self.searches = {limit: RateSearch(pace) for limit, pace in paces.items()}
        self._requests, self._tokens = self.searches[Limit.REQUESTS], self.searches[Limit.TOKENS]
        self._paces = paces
        self._crowding = in_flight.crowding
        self._in_flight = in_flight
        self._on_kind = on_kind
        self.out = 0
        self.share = Share()
        self._trail = Trail()
        self._storm = Walk(STORM_BAR, self._ordinary)
        self._excess = Walk(EXCESS_BAR)
        self._runs = Runs()
        self._since = 0  # attempts of a lower order were sent before the last change: they say nothing of it
        self._taken = True
        self._limit = Limit.REQUESTS
        self._told_when = False
        self._slower: _Slower | None = None
        self._slower_s = 0.0
        self._slower_wait_s = TRY_AGAIN_S
        self._is_storm = False
        self._finding = NOTHING

    @property
    def in_words(self) -> str | None:
        """What refusals are taken for now; None where hardly anything is refused."""
        if self._crowding.cap is not None:
            return "more at once are refused"
        if any(search.per_s is not None for search in self.searches.values()):
            return "a limit learned from refusals"
        share = float(self.share)
        return f"{share:.1%} refused by chance" if self.share.is_known and share >= WORTH_A_WORD else None

    def sent(self, now_s: float, tokens: int) -> None:
        """One attempt more is out. To be called for every one, in order."""
        self._trail.sent(now_s, self.out, tokens)
        self.out += 1

    def ended(self, order: int, now_s: float, *, reached: bool = True) -> None:
        """The attempt was not refused: it was answered, failed otherwise, or (not `reached`) never sent."""
        self.out -= 1
        self._trail.ended(order, now_s, refused=False, counts=reached)
        self._judge(now_s)

    def refused(self, order: int, now_s: float, limit: Limit, *, told_when: bool, empty: bool = False) -> Finding:
        """The attempt was refused by this limit, as far as the server says, which may have said when to come back.

        `empty`: its headers show an empty bucket.
        """
        self.out -= 1
        self._trail.ended(order, now_s, refused=True)
        if order >= self._since:
            self._limit, self._told_when = limit, told_when
        if empty and order >= self._since:
            self._pause(now_s, now_s, lone=True)
        else:
            self._judge(now_s)
        finding, self._finding = self._finding, NOTHING
        return finding

    def correct(self, tokens: float) -> None:
        """An attempt took so many more tokens than was thought."""
        self.searches[Limit.TOKENS].correct(tokens)

    def rise(self, now_s: float) -> None:
        """Learned rates are tried upwards when it is time."""
        if self._slower is None:
            for search in self.searches.values():
                search.rise(now_s, float(self.share))

    def reopened(self, now_s: float) -> None:
        """The gate's pause is over."""
        self.searches[self._limit].reopened(now_s)

    def _judge(self, now_s: float) -> None:
        for order, attempt in self._trail.known(now_s):
            self._count(order, attempt, now_s)

    def _count(self, order: int, attempt: Sent, now_s: float) -> None:
        """One attempt more, in the order of sending, of which it is known whether it was taken."""
        refused = bool(attempt.refused)
        self._requests.count(attempt.at_s, 1, refused=refused)
        self._tokens.count(attempt.at_s, attempt.tokens, refused=refused)
        if refused or self._runs.row or self._runs.found:
            self._runs.count(attempt.at_s, refused=refused)
        if not refused and self._is_quiet:
            self._crowding.took(now_s, attempt.others, self._in_flight.most)
            if order >= self._since:
                self._taken = True
                self.share.add(0, 1)
            return
        if refused and self._crowding.refused(now_s, attempt.others):
            return
        if not refused:
            self._crowding.took(now_s, attempt.others, self._in_flight.most)
        if order < self._since:
            return
        self._taken |= not refused
        if self._slower is not None:
            self._try_slower(self._slower, now_s, refused=refused)
        elif self._is_too_much(refused=refused):
            self._act(attempt.at_s, now_s)
        elif not refused:
            self._begin_slower(attempt.at_s, now_s)

    @property
    def _is_quiet(self) -> bool:
        """True while nothing is suspected, learned or tried: an attempt that was taken changes none of that then."""
        if not self._storm.is_at_zero or self._slower is not None or float(self.share) >= LEAST_DOUBTED:
            return False
        learned = self._requests.per_s is not None or self._tokens.per_s is not None
        return not learned and self._crowding.cap is None and not self._crowding.on_trial

    def _is_too_much(self, *, refused: bool) -> bool:
        share = float(self.share)
        ordinary = min(MOST_ORDINARY, max(self._least_ordinary, share))
        patience = self._runs.patience
        storm = self._storm.step(ordinary, max(STORM_SHARE, ordinary + STORM_ABOVE), refused=refused, times=patience)
        self._is_storm = storm or (refused and not self._taken and self._storm.refused >= NONE_TAKEN)
        ordinary = min(MAX_ORDINARY, max(LEAST_SHARE, self._runs.ordinary(share)))
        excess = False
        if self._crowding.on_trial:
            ordinary = max(TRIAL_ORDINARY, ordinary)
            excess = self._excess.step(ordinary, max(STORM_SHARE, ordinary + TRIAL_ABOVE), refused=refused)
        elif self.searches[self._limit].per_s is not None and not self._runs.is_one:
            excess = self._excess.step(ordinary, ordinary + EXCESS_ABOVE, refused=refused)
        return self._is_storm or excess

    @property
    def _least_ordinary(self) -> float:
        """What may be refused by chance, for all that is known: less where a limit is known, or a number in flight is
        likely, since such a server does not say when to come back.
        """
        known = any(pace.told is not None or pace.stated is not None for pace in self._paces.values())
        return LEAST_ORDINARY_KNOWN if known or not self._told_when else LEAST_ORDINARY

    def _act(self, at_s: float, now_s: float) -> None:
        search = self.searches[self._limit]
        if self._crowding.cap is not None:
            if self._crowding.doubt(now_s):
                self._start_again()
            else:
                self._pause(at_s, now_s)
        elif self._suspects_crowding(search, now_s):
            for each in self.searches.values():
                each.drop(now_s, "fewer in flight instead")
            self._on_kind("crowding", f"at most {self._crowding.cap} in flight")
            self._start_again()
        elif search.is_chance(at_s, now_s, self.share):
            self._slower_s = now_s + self._slower_wait_s  # that was such a trial
            self._runs.is_chance(now_s)
            self._on_kind("chance", f"{float(self.share):.1%} are refused at any rate")
            self._start_again()
        elif self._is_storm:
            self._pause(at_s, now_s)
        elif self._rate_is_no_cause(search, at_s, now_s):
            self._start_again()
        elif search.exceeded(at_s, now_s, float(self.share)) is Step.TOO_EARLY:
            self._excess.clear()
        else:
            self._runs.is_paid = True
            self._on_kind("limit", "more was refused than in ordinary times")
            self._start_again()

    def _suspects_crowding(self, search: RateSearch, now_s: float) -> bool:
        """A storm whose refusals don't say when to come back, or an excess at a rate that was measured."""
        if self._is_storm:
            return not self._told_when and self._crowding.suspect(now_s, self._storm.refused)
        stated = any(pace.stated is not None for pace in self._paces.values())
        return search.is_firm and not stated and self._crowding.suspect(now_s, LEAST_REFUSED, LEAST_OVERLAP)

    def _pause(self, at_s: float, now_s: float, *, lone: bool = False) -> None:
        self._finding = Finding(storm=True, taken=self._taken)
        search = self.searches[self._limit]
        if not lone and self._rate_is_no_cause(search, at_s, now_s):
            pass
        elif lone or not self._runs.is_paid:
            search.storm(at_s, now_s, lone=lone, keep=self._runs.found)
            self._runs.is_paid = True
        self._on_kind("limit", "an empty bucket" if lone else "nearly everything was refused")
        self._taken = False
        self._slower = None
        self._start_again()

    def _rate_is_no_cause(self, search: RateSearch, at_s: float, now_s: float) -> bool:
        """True where this has just been shown, and the rate from before holds again."""
        if not self._runs.lowered(now_s, search.per_s, search.shown(at_s)):
            return False
        search.restore(self._runs.before, now_s, "refusals come in runs, slower or not")
        self._on_kind("chance", "refusals come in runs, slower or not")
        return True

    def _start_again(self) -> None:
        """What was sent until now is no evidence of what has been changed."""
        self._storm.clear()
        self._excess.clear()
        self._since = self._trail.next_order

    def _ordinary(self, refused: int, count: int) -> None:
        """So many attempts came to nothing: what was refused among them was chance, where it can only be that."""
        if all(search.is_settled for search in self.searches.values()):
            self.share.add(refused, count)

    def _begin_slower(self, at_s: float, now_s: float) -> None:
        if self._runs.found:
            return  # a trial of a hundred requests may fall between two runs
        share, free = float(self.share), all(pace.per_minute is None for pace in self._paces.values())
        if share < LEAST_DOUBTED or not free or self._crowding.cap is not None or now_s < self._slower_s:
            return
        per_s = self._requests.lately(at_s)
        if per_s is None or not self.share.is_known or not self._storm.is_low:
            return
        self._slower = _Slower(now_s, share, per_s)
        self._paces[Limit.REQUESTS].learn(SLOWER * per_s * 60, now_s, "slower on purpose: do refusals end?")
        self._paces[Limit.REQUESTS].stand_at(0.0, now_s)
        self._since = self._trail.next_order

    def _try_slower(self, trial: _Slower, now_s: float, *, refused: bool) -> None:
        trial.count += 1
        trial.refused += refused
        if trial.count < max(LEAST_TRIED, EXPECTED / trial.share):
            return
        self._slower = None
        so_few = sum(
            math.comb(trial.count, k) * trial.share**k * (1 - trial.share) ** (trial.count - k)
            for k in range(trial.refused + 1)
        )
        if so_few < HELPED and trial.refused / trial.count < trial.share * HELPED_SHARE:
            self._requests.slower_helped(trial.per_s, now_s)
            self.share.be(trial.refused / trial.count, trial.count)
            self._on_kind("limit", "slower on purpose ended the refusals")
        else:
            self._requests.drop(now_s, "slower did not help")
            self._slower_wait_s = max(2 * self._slower_wait_s, TRY_AGAIN_TIMES * (now_s - trial.begun_s))
            self._slower_s = now_s + self._slower_wait_s
            self._on_kind("chance", f"{trial.share:.1%} are refused, slower or not")
        self._start_again()
