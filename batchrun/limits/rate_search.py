"""Finds the rate of an unknown limit from refusals: measured between two of them, then tried upwards. PURE.

Between two moments with an empty bucket `measured_rate` measures the limit. Between two random refusals it measures
only the present rate, and taking that for a limit would lower the rate with each refusal. The test is to go slower:
slightly below a measured limit refusals end, and random ones stay. If they stay, the earlier rate is restored.
"""

import math

import msgspec

from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import Limit
from batchrun.limits.evidence import RefusedShare
from batchrun.limits.known_limit import KnownLimit
from batchrun.limits.measured_rate import MeasuredRate
from batchrun.limits.rate_climb import DOUBLED, RateClimb
from batchrun.limits.request_spacing import FIRST_PER_S, RequestSpacing

BELOW_MEASURED = 0.98
"""The share of a measured rate that is used: refusals stop, and the server's bucket fills a little for the next try."""

BELOW_BURST = 0.5
"""The share of a rate that includes a burst of unknown size: too low is corrected in seconds, too high costs refusals
until it can be measured."""

SMALL_BUCKET = 7
"""Eight requests are sent at once at the start: a bucket that accepts fewer, and those sent first, is searched by
evenly spaced requests."""

MOST_SPACED = 3
"""Such a bucket accepts as many again, at most, in each round until its refusals show a limit: three rounds have more
refusals than that takes."""

USUAL = 2
"""Most buckets hold two seconds' worth: if two are accepted at once, the limit is one a second, or the bucket is small.
Half of the burst is the first guess then, which costs fewer refusals."""

BELOW_REFUSED = 0.7
"""The share of a rate at which nearly everything was refused before anything could be measured."""

LEAST_LEARNED = 0.3
"""The least share of a learned rate that is kept: at a low rate, the last second says little."""

BELOW_LONE = 0.95
"""The share of a token rate kept after a single refusal, which a wrong size estimate explains as well. A single refused
request in a request limit has no such excuse: someone else draws on the limit."""

LEAST_AFTER_PAUSE = 0.4
"""The least share of the rate kept after a pause: what the bucket refilled meanwhile may not all have been used."""

SPACED_BAR = 1.5
EXPECTED_BAR = 0.5
BELIEVED_BAR = 2.0
FALL = 4.0
"""How many times the usual evidence lowers the rate. Where only evenly spaced requests are accepted, two refusals do:
every second one is refused slightly above the limit. Once a climb has emptied the bucket of a limit that was measured
twice, one refusal does. At or below that limit it takes twice as much (with one in a hundred refused by chance, three
in a hundred are common). At a rate far above what was measured it takes more, because a false alarm costs as much."""

LEAST_COUNT = 12
LEAST_CALM_SHARE, LEAST_SHARE = 0.05, 0.1
MAX_SHARE = 0.8
ALIKE = 2.0
FAR_BELOW = 0.85
"""Refusals are random if a rate below the measured one meets the same share of them, within a factor of two. A small
share proves that only before the rate was raised again; when nearly everything is refused it is never random."""

MUCH_CHANCE = 0.25
"""If this share is refused at any rate, no learned rate is kept: a real limit would show again at once."""

LEAST_SURE = 100
"""A share found at two rates gets the weight of this many attempts. With fewer, the prior (almost nothing is refused)
would win, and the next refusals would look like a storm."""

LEAST_PER_S = 0.02


class _Cut(msgspec.Struct, frozen=True):
    """The rate was lowered to just below a measured one: from `per_s`, with `share` of `count` attempts refused."""

    per_s: float | None
    share: float
    count: int


class RateSearch:
    """Searches one learned rate, kept in its `AdaptiveRate`. Amounts are requests or tokens; rates are per second.

    `raised`: the rate was raised since it was last lowered. `confirmed`: the last rate per minute from which it was
    raised further, so not one that a refusal by chance has shown.
    """

    def __init__(self, rate: AdaptiveRate) -> None:
        self._rate = rate
        self.raised = rate.learned is not None
        self.confirmed = rate.learned
        self.measured = MeasuredRate()
        self._climb = RateClimb()
        self._paused = False
        self._cut: _Cut | None = None
        self._before_chain: float | None = None
        self._known = KnownLimit()
        self._spacing: RequestSpacing | None = None  # if the server's bucket holds a few requests only

    @property
    def per_s(self) -> float | None:
        """The learned rate; None without one."""
        learned = self._rate.learned
        return None if learned is None else learned / 60

    def needed(self, at_s: float) -> float:
        """How many times the usual evidence it takes to lower the rate."""
        if self._spacing is not None:
            return SPACED_BAR
        known, measured = self._known, self.measured
        if self.raised and known.has_emptied(self.per_s, at_s, measured.delivered.total, measured.amount):
            return EXPECTED_BAR
        return BELIEVED_BAR if known.is_sure or known.is_back else 1 + FALL * self.excess(at_s)

    @property
    def is_settled(self) -> bool:
        """True if refusals can only be random: no rate was learned, or it is just below a measured limit."""
        return self.per_s is None or not (self.raised or self._climb.is_rough or self._paused)

    @property
    def is_searching(self) -> bool:
        """True while each accepted attempt may raise the rate."""
        return self._spacing is not None and self._spacing.is_searching

    def count(self, at_s: float, amount: float, *, refused: bool) -> None:
        """An attempt sent at `at_s` was accepted or refused. To be called in the order of sending."""
        if self._spacing is not None:
            self._spacing.count(at_s, refused=refused)
        self.measured.count(at_s, amount, refused=refused)

    def storm(self, at_s: float, now_s: float, *, lone: bool = False, keep: bool = False) -> None:
        """Nearly everything sent at about `at_s` was refused: the bucket is empty, and the gate pauses.

        `lone`: a single refusal whose headers show an empty bucket. `keep`: refusals come in runs here, so the rate
        stays at least at what was accepted lately.
        """
        if self._spacing is not None and self._fall_back(self._spacing, at_s, now_s):
            return
        measured, total, in_force = self.measured, self.measured.delivered.total, self._rate.per_minute
        before, rate, rough = self.per_s, measured.per_s(at_s), False
        known = before if before is not None or in_force is None else in_force / 60
        self._cut = None
        if rate is not None:  # measured since the bucket was last empty
            rough = not measured.is_firm
            self._cut = _Cut(before, measured.share, measured.counted)
            rate *= BELOW_MEASURED
        elif lone and self._rate.limit is Limit.TOKENS and known is not None:
            rate, rough = BELOW_LONE * known, True
        elif known is not None:  # nothing is measured yet: this rate was too high, and some of it was accepted
            rate, rough = BELOW_REFUSED * known, True
            if total:
                least = 0.0 if before is None else LEAST_LEARNED * before
                rate = min(rate, max(least, BELOW_BURST * measured.delivered.in_last_second(at_s)))
            # a few wrong estimates are a storm, too; what was accepted for ten seconds is nearer to the limit
            rate = max(rate, measured.at_least(at_s))
        elif total:  # the first refusals ever, with no limit known: a full bucket has been emptied
            rate, rough = BELOW_BURST * measured.delivered.in_last_second(at_s), True
            small = not measured.is_marked and measured.at_first >= total / MOST_SPACED
            if small and (measured.at_first != USUAL * measured.amount or measured.refilled_per_s(at_s) > FIRST_PER_S):
                rate = self._space_out(at_s) or rate
        self._remember(before)
        if rate is not None:
            if keep and (kept := BELOW_MEASURED * measured.delivered.sustained()) > rate:
                rate, rough = kept, True
            self._lower(rate, now_s, rough=rough, why="an empty bucket" if lone else "nearly everything was refused")
        self.measured.mark(at_s)
        self._paused = True

    def space_out(self, at_s: float, now_s: float) -> None:
        """More at once were refused, but are accepted one by one: the server's bucket is small."""
        if self.per_s is None and (rate := self._space_out(at_s)) is not None:
            self._lower(rate, now_s, rough=True, why="accepted one by one, and not at once")
            self.measured.mark(at_s)

    def _space_out(self, at_s: float) -> float | None:
        """Begins to search by evenly spaced requests, at the rate that is returned; None if the bucket is not small."""
        measured = self.measured
        holds = measured.at_first / measured.amount
        if holds > SMALL_BUCKET or (holds > 1 and measured.is_mixed):  # a bucket accepts the first of them
            return None
        self._spacing = RequestSpacing(holds)
        self._rate.burst = 1.0
        return max(FIRST_PER_S, BELOW_BURST * holds, measured.refilled_per_s(at_s) / measured.amount)

    def exceeded(self, at_s: float, now_s: float, ordinary: float = 0.0, *, by_chance: bool = True) -> bool:
        """More than the `ordinary` share was refused at this rate. `by_chance`: that may have been chance.

        True if the rate was lowered; False if it is too early to know by how much.
        """
        if self._spacing is not None:
            return self._fall_back(self._spacing, at_s, now_s, ordinary)
        rate, measured, before = self.shown(at_s), self.measured, self.per_s
        assert before is not None
        if rate is None:
            if not measured.is_marked:
                self.measured.mark(at_s)
            return False
        self._remember(before)
        # what is refused in a window of time leaves less measured than its limit, but more at each climb
        passed = by_chance and self._known.is_passed(rate)
        rough = self._paused or not measured.is_firm or passed
        was_sure = self._known.is_sure
        if self._known.is_met(rate):
            self._climb.rest_after(measured.refused_above(ordinary), measured.counted)
        rate = self._known.measure(rate, measured.taken / measured.amount, by_chance=by_chance)
        if not self._paused:
            # a limit that was sure may have changed, and this rate was measured across the change
            self._cut = None if was_sure else _Cut(before, measured.share, measured.counted)
        why = f"refused; {rate * 60:.0f} a minute were accepted"
        self._lower(rate * BELOW_MEASURED, now_s, rough=rough, steady=passed, why=why)
        self.measured.mark(at_s)
        self._paused = False
        return True

    def _fall_back(self, spacing: RequestSpacing, at_s: float, now_s: float, ordinary: float = 0.0) -> bool:
        """Falls back to a rate that was accepted; False if none is known yet."""
        before = self.per_s
        assert before is not None
        rate = spacing.lower(before)
        if rate is None:
            return False
        self._remember(before)
        self._cut = None
        self._known = KnownLimit()
        if not spacing.is_searching:
            self._known.per_s = rate
            self._climb.rest_long(self.measured.refused_above(ordinary), rate / self.measured.amount)
        self._lower(rate, now_s, rough=spacing.is_searching, why=f"refused; {rate * 60:.0f} a minute were accepted")
        self.measured.mark(at_s)
        self._paused = False
        self._end_spacing(spacing)
        return True

    def _end_spacing(self, spacing: RequestSpacing) -> None:
        """From now on the rate is measured as that of any bucket, but nothing is sent at once."""
        if spacing.is_found:
            self._spacing, self._known = None, KnownLimit()
            self._known.per_s = self.per_s

    def is_chance(self, at_s: float, now_s: float, ordinary: RefusedShare) -> bool:
        """True if a lower rate did not lower the refused share: that share counts as ordinary from now on."""
        if self._spacing is not None and self._spacing.is_contradicted:
            ordinary.set(float(self._spacing.share), LEAST_SURE)
            self.restore(None, now_s, "rates far below accepted ones are refused")
            return True
        cut, counted, share, rate = self._cut, self.measured.counted, self.measured.share, self.per_s
        if cut is None or rate is None or counted < LEAST_COUNT:
            return False
        if self.raised and not (cut.per_s is None or rate <= FAR_BELOW * cut.per_s):
            return False  # too near to the refused rate again to differ from a limit
        least = max(LEAST_SHARE if self.raised else LEAST_CALM_SHARE, cut.share / ALIKE)
        if not least <= share <= min(MAX_SHARE, cut.share * ALIKE):
            return False
        count = cut.count + counted
        share = (cut.share * cut.count + self.measured.refused) / count
        error = math.sqrt(share * (1 - share) / count)  # one sigma: assumed too low, it would look like a storm
        ordinary.set(share + error, max(LEAST_SURE, count))
        restored = None
        if self.confirmed is not None and share < MUCH_CHANCE:  # else the first lowering was also a mistake
            restored = cut.per_s if self.raised else self._before_chain
        self._cut = self.confirmed = None
        self.measured.mark(at_s)
        self._set(restored, now_s, f"{share:.0%} are refused at any rate")
        self._climb.begin(rough=False)
        self.raised = True
        return True

    def restore(self, per_s: float | None, now_s: float, why: str) -> None:
        """Restores an earlier rate, because the rate did not cause the refusals."""
        self._cut = self.confirmed = None
        self.measured.unmark()
        self._set(per_s, now_s, why)
        self._climb.begin(rough=True, step=DOUBLED)
        self.raised = True

    def slower_helped(self, per_s: float, now_s: float) -> None:
        """A lower rate ended refusals: what was accepted before is the limit."""
        self._cut = None
        self.measured.unmark()
        self._lower(BELOW_MEASURED * per_s, now_s, rough=False, why="slower on purpose, nothing was refused")

    def rise(self, now_s: float, share: float) -> bool:
        """Tries a higher rate when it is time, and returns True then; `share` is refused in ordinary times."""
        rate, spacing, climb = self.per_s, self._spacing, self._climb
        if rate is None:
            return False
        if spacing is not None and spacing.is_searching:
            return self._rise_spaced(spacing, rate, now_s)
        total = self.measured.delivered.total
        requests_per_s = rate * self._rate.requests / total if total else rate
        if not climb.is_due(now_s, self._rate.taken, rate, requests_per_s):
            return False
        if self._known.is_back:  # the doubted limit was in use until now, and nothing was refused
            self._known.confirm()
        elif self._known.doubted is not None:
            self.raised = True
            self._set(max(rate, BELOW_MEASURED * self._known.go_back()), now_s, "back to what was measured before")
            return True
        elif not self.raised and climb.rests:
            return False
        if not self.raised:
            climb.counted_before = self.measured.counted
            self._known.climb(now_s, total, self.measured.server_level(now_s, self._known.per_s))
            rate /= 1 - min(0.5, share)  # the measured rate counts accepted requests; more must be sent
        elif not climb.is_rough:
            self.confirmed = rate * 60
        self.raised = True
        if spacing is not None:
            spacing.prove()
            spacing.restart(now_s)
        self._set(rate * (1 + climb.next_step()), now_s, "nothing refused since")
        return True

    def _rise_spaced(self, spacing: RequestSpacing, rate: float, now_s: float) -> bool:
        if not spacing.is_tried(rate):
            return False
        spacing.prove()
        self.raised = True
        self._set(spacing.higher(rate), now_s, "nothing refused since")
        self._climb.is_rough = spacing.is_searching
        self._climb.restart(now_s, self._rate.taken)
        spacing.restart(now_s)
        self._end_spacing(spacing)
        return True

    def share_below(self, ordinary: float) -> tuple[float, int] | None:
        """The refused share since the bucket was last empty, and of how many; None unless clearly below `ordinary`."""
        counted, share = self.measured.counted, self.measured.share
        return None if counted * ordinary < LEAST_COUNT or share > ordinary / ALIKE else (share, counted)

    def drop(self, now_s: float, why: str) -> None:
        """Drops the learned rate."""
        if self._rate.learned is not None:
            self._set(None, now_s, why)

    def reopened(self, now_s: float) -> None:
        """The pause is over. What the server's bucket refilled meanwhile is left as a margin."""
        if self._spacing is not None:
            self._rate.stand_at(min(self._rate.level(now_s), self.measured.amount), now_s)
            return
        self._climb.restart(now_s, self._rate.taken)
        self._rate.stand_at(0.0, now_s)

    def forget(self) -> None:
        """Drops everything learned, because the limit is now known from a better source."""
        self.confirmed = self._cut = None
        self._known = KnownLimit()
        self.measured.unmark()
        self._climb.is_rough = self._paused = self.raised = False
        self._spacing = None
        self._rate.burst = math.inf

    def shown(self, at_s: float) -> float | None:
        """The measured rate, corrected for a bucket that refilled in a pause and was not all used."""
        rate = self.measured.per_s(at_s)
        if rate is None or not self._paused or self.per_s is None:
            return rate
        return max(rate, LEAST_AFTER_PAUSE * self.per_s)

    def excess(self, at_s: float) -> float:
        """The share that is refused from now on if the limit is what was measured; 0 while that says nothing."""
        rate, measured = self.per_s, self.shown(at_s)
        return 0.0 if rate is None or measured is None else max(0.0, 1 - measured / rate)

    def _remember(self, before: float | None) -> None:
        """Keeps the rate from before a series of lowerings without a rise between them."""
        if before is None or self.raised:
            self._before_chain = before

    def _lower(self, per_s: float, now_s: float, *, rough: bool, steady: bool = False, why: str) -> None:
        before = self.per_s
        if before is not None and self._spacing is None:
            # too much was refused at the present rate, whatever was measured
            per_s = min(per_s, BELOW_MEASURED * before)
        self.raised = False
        self._climb.begin(rough=rough, steady=steady)
        self._climb.restart(now_s, self._rate.taken)
        if self._spacing is not None:
            self._spacing.restart(now_s)
        self._set(max(per_s, LEAST_PER_S), now_s, why)
        self._rate.stand_at(min(0.0, self._rate.level(now_s)), now_s)

    def _set(self, per_s: float | None, now_s: float, why: str) -> None:
        self._rate.learn(None if per_s is None else per_s * 60, now_s, why)
        if self._rate.learned is None:
            self.forget()
