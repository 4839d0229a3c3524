"""Finds the rate of an unknown limit from refusals: measured between two of them, then tried upwards. PURE.

While a server's bucket is empty it accepts exactly what its limit refills. So accepted ÷ time between two moments at
which it was empty *is* the limit, bursts and pauses included. Between two random refusals it is only the present rate,
and taking it for a limit would lower the rate with each refusal. The test is to go slower: slightly below a measured
limit refusals end, and random ones stay. If they stay, the earlier rate is restored.
"""

import math
from enum import Enum, auto

import msgspec

from batchrun.limits.adaptive_rate import AdaptiveRate
from batchrun.limits.admission import Limit
from batchrun.limits.evidence import RefusedShare
from batchrun.limits.known_limit import KnownLimit
from batchrun.limits.request_spacing import FIRST_PER_S, RequestSpacing
from batchrun.limits.throughput import LEAST_SPAN_S, WINDOW_S, Throughput

BELOW_MEASURED = 0.98
"""The share of a measured rate that is used: refusals stop, and the server's bucket fills a little for the next try."""

BELOW_BURST = 0.5
"""The share of a rate that includes a burst of unknown size: too low is corrected in seconds, too high costs refusals
until it can be measured."""

SMALL_BUCKET = 7
MOMENT_S = 0.005
"""Eight requests are sent at once at the start, within a few milliseconds: a bucket that accepts fewer, and those sent
first, is searched by evenly spaced requests."""

MOST_SPACED = 3
"""Such a bucket accepts as many again, at most, in each round until its refusals show a limit: three rounds have more
refusals than that takes."""

BELOW_REFUSED = 0.7
"""The share of a rate at which nearly everything was refused before anything could be measured."""

LEAST_LEARNED = 0.3
"""The least share of a learned rate that is kept: at a low rate, the last second says little."""

BELOW_LONE = 0.95
"""The share of a token rate kept after a single refusal, which a wrong size estimate explains as well. A single refused
request in a request limit has no such excuse: someone else draws on the limit."""

LEAST_AFTER_PAUSE = 0.4
"""The least share of the rate kept after a pause: what the bucket refilled meanwhile may not all have been used."""

LEAST_TIMES = 10
"""Over less than a second, or ten times the refused amount, one request more or less distorts the rate."""

FIRM_TIMES = 20
"""Below this the rate is rough, and tried upwards faster."""

BURST_OFF = 0.85
"""If the bucket was empty long ago, less than the limit may have been sent since: what was accepted in the last ten
seconds, less a burst, is a lower bound of the limit."""

ROUGH_STEP, ROUGH_EVERY_S, ROUGH_EVERY = 0.05, 1.0, 10
STEP, EVERY_S, MAX_EVERY_S, EVERY = 0.01, 3.0, 8.0, 40
FASTER, ROUGH_FASTER, MAX_STEP = 2.0, 1.5, 0.32
"""Upwards by 1, 2, 4 … 32 %, after three seconds or forty requests each (a rough rate by 5 % after one second or ten):
a doubled limit is in use within half a minute, and an unchanged one costs one refusal in a hundred requests."""

DOUBLED = 1.0
"""If the rate did not cause the refusals, it doubles each second until they return."""

SPACED_BAR = 1.5
EXPECTED_BAR = 0.5
BELIEVED_BAR = 2.0
FALL = 4.0
"""How many times the usual evidence lowers the rate. Where only evenly spaced requests are accepted, two refusals do:
every second one is refused slightly above the limit. Once a climb has emptied the bucket of a limit that was measured
twice, one refusal does. At or below that limit it takes twice as much (with one in a hundred refused by chance, three
in a hundred are common). At a rate far above what was measured it takes more, because a false alarm costs as much."""

WORTH = 0.0125
MOST_REST = 100
MOST_REST_S = 120.0
MET = 0.05
"""If a climb ends at the limit already known, it cost its refusals for nothing: the next climb waits until they are
1.25 % of what was sent, for 100 requests at most. Below ten a second that is longer than the steps take anyway. Where
only evenly spaced requests are accepted, each climb is refused, so it waits for up to two minutes."""

USED = 0.8
"""The rate is raised only while this share of it is used: otherwise the absence of refusals proves nothing."""

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


class Step(Enum):
    """The result of `RateSearch.exceeded`."""

    TOO_EARLY = auto()
    LOWERED = auto()


class _Cut(msgspec.Struct, frozen=True):
    """The rate was lowered to just below a measured one: from `per_s`, with `share` of `count` attempts refused."""

    per_s: float | None
    share: float
    count: int


class RateSearch:
    """Searches one learned rate, kept in its `AdaptiveRate`. Amounts are requests or tokens; rates are per second."""

    def __init__(self, rate: AdaptiveRate) -> None:
        self._rate = rate
        self.raised = rate.learned is not None
        self.confirmed = rate.learned
        self._rough = False
        self._step = STEP
        self._raised_s = 0.0
        self._raised_total = 0.0
        self._delivered = Throughput()
        self._mark: tuple[float, float] | None = None
        self._paused = False
        self._counted = self._refused = 0
        self._before_refusal: float | None = None  # accepted before the first one
        self._is_mixed = False  # of those sent first, one was accepted after a refusal
        self._amount = 1.0  # of the last refused attempt
        self._cut: _Cut | None = None
        self._before_chain: float | None = None
        self._known = KnownLimit()
        self._burst: tuple[float, float] | None = None  # the first refusal came after so long, and so much accepted
        self._spacing: RequestSpacing | None = None  # if the server's bucket holds a few requests only
        self._rest = 0.0  # requests before the next climb
        self._climbs_from = 0  # of those counted, how many came before this one

    @property
    def per_s(self) -> float | None:
        """The learned rate; None without one."""
        learned = self._rate.learned
        return None if learned is None else learned / 60

    def needed(self, at_s: float) -> float:
        """How many times the usual evidence it takes to lower the rate."""
        if self._spacing is not None:
            return SPACED_BAR
        known = self._known
        if self.raised and known.is_exceeded(self.per_s) and known.is_empty(at_s, self._delivered.total, self._amount):
            return EXPECTED_BAR
        return BELIEVED_BAR if known.is_believed else 1 + FALL * self.excess(at_s)

    @property
    def is_settled(self) -> bool:
        """True if refusals can only be random: no rate was learned, or it is just below a measured limit."""
        return self.per_s is None or not (self.raised or self._rough or self._paused)

    @property
    def is_searching(self) -> bool:
        """True while each accepted attempt may raise the rate."""
        return self._spacing is not None and self._spacing.is_searching

    def count(self, at_s: float, amount: float, *, refused: bool) -> None:
        """An attempt sent at `at_s` was accepted or refused. To be called in the order of sending."""
        self._counted += 1
        if self._spacing is not None:
            self._spacing.count(at_s, refused=refused)
        if refused:
            self._refused += 1
            self._amount = amount
            if self._before_refusal is None:
                self._before_refusal = self._delivered.total
            return
        self._is_mixed |= self._refused > 0 and self._delivered.span_s(at_s) <= MOMENT_S
        self._delivered.add(at_s, amount)

    def accepted(self, at_s: float, amount: float, count: int) -> None:
        """As `count`, for several attempts that were accepted, the last of them sent at `at_s`."""
        self._counted += count
        self._delivered.add(at_s, amount)

    def correct(self, more: float) -> None:
        """An accepted attempt used this much more than its estimate."""
        self._delivered.total += more

    def lately(self, at_s: float) -> float | None:
        """The accepted rate over the last ten seconds; None over less than one."""
        return self._delivered.lately(at_s)

    def storm(self, at_s: float, now_s: float, *, lone: bool = False, keep: bool = False) -> None:
        """Nearly everything sent at about `at_s` was refused: the bucket is empty, and the gate pauses.

        `lone`: a single refusal whose headers show an empty bucket. `keep`: refusals come in runs here, so the rate
        stays at least at what was accepted lately.
        """
        if self._spacing is not None and self._fall_back(self._spacing, at_s, now_s):
            return
        rate, rough = self._measured(at_s), False
        before, share = self.per_s, self._share
        self._cut = None
        if rate is not None:
            rough = self._taken_since() < FIRM_TIMES * self._amount
            self._cut = _Cut(before, share, self._counted)
            rate *= BELOW_MEASURED
        elif lone and self._rate.limit is Limit.TOKENS and (known := before or self._known_per_s) is not None:
            rate, rough = BELOW_LONE * known, True
        elif (known := before or self._known_per_s) is not None:
            rate, rough = BELOW_REFUSED * known, True
            if self._delivered.total:
                least = 0.0 if before is None else LEAST_LEARNED * before
                rate = min(rate, max(least, BELOW_BURST * self._delivered.in_last_second(at_s)))
            if self._delivered.span_s(at_s) >= WINDOW_S:
                # a few wrong estimates are a storm, too; what was accepted for ten seconds is nearer to the limit
                rate = max(rate, BURST_OFF * (self.lately(at_s) or 0.0))
        elif self._delivered.total:
            rate, rough = BELOW_BURST * self._delivered.in_last_second(at_s), True
            if self._mark is None and (self._before_refusal or 0.0) >= self._delivered.total / MOST_SPACED:
                rate = self._space_out() or rate
        self._remember(before)
        if rate is not None:
            if keep and (kept := BELOW_MEASURED * self._delivered.sustained()) > rate:
                rate, rough = kept, True
            self._lower(rate, now_s, rough=rough, why="an empty bucket" if lone else "nearly everything was refused")
        self._set_mark(at_s)
        self._paused = True

    def space_out(self, at_s: float, now_s: float) -> None:
        """More at once were refused, but are accepted one by one: the server's bucket is small."""
        if self.per_s is None and (rate := self._space_out()) is not None:
            self._lower(rate, now_s, rough=True, why="accepted one by one, and not at once")
            self._set_mark(at_s)

    def _space_out(self) -> float | None:
        """Begins to search by evenly spaced requests, at the rate that is returned; None if the bucket is not small."""
        holds = (self._before_refusal or 0.0) / self._amount
        if not 1 <= holds <= SMALL_BUCKET or (holds > 1 and self._is_mixed):  # a bucket accepts the first of them
            return None
        self._spacing = RequestSpacing(holds)
        self._rate.limit_burst(1.0)
        return max(FIRST_PER_S, BELOW_BURST * holds)

    def exceeded(self, at_s: float, now_s: float, ordinary: float = 0.0, *, by_chance: bool = True) -> Step:
        """More than the `ordinary` share was refused at this rate. `by_chance`: that may have been chance."""
        if self._spacing is not None:
            return Step.LOWERED if self._fall_back(self._spacing, at_s, now_s, ordinary) else Step.TOO_EARLY
        rate = self.shown(at_s)
        before, share = self.per_s, self._share
        assert before is not None
        if rate is None:
            if self._mark is None:
                self._set_mark(at_s)
            return Step.TOO_EARLY
        self._remember(before)
        rough = self._paused or self._taken_since() < FIRM_TIMES * self._amount
        was_sure = self._known.is_sure
        self._schedule_next_climb(rate, ordinary)
        rate = self._known.measure(rate, self._taken_since() / self._amount, by_chance=by_chance)
        if not self._paused:
            # a limit that was sure may have changed, and this rate was measured across the change
            self._cut = None if was_sure else _Cut(before, share, self._counted)
        self._lower(rate * BELOW_MEASURED, now_s, rough=rough, why=f"refused; {rate * 60:.0f} a minute were accepted")
        self._set_mark(at_s)
        self._paused = False
        return Step.LOWERED

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
            refused = self._refused - ordinary * self._counted
            self._rest = min(refused / WORTH, max(MOST_REST, MOST_REST_S * rate / self._amount))
        self._lower(rate, now_s, rough=spacing.is_searching, why=f"refused; {rate * 60:.0f} a minute were accepted")
        self._set_mark(at_s)
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
        cut, share, rate = self._cut, self._share, self.per_s
        if cut is None or rate is None or self._counted < LEAST_COUNT:
            return False
        if self.raised and not (cut.per_s is None or rate <= FAR_BELOW * cut.per_s):
            return False
        least = max(LEAST_SHARE if self.raised else LEAST_CALM_SHARE, cut.share / ALIKE)
        if not least <= share <= min(MAX_SHARE, cut.share * ALIKE):
            return False
        count = cut.count + self._counted
        share = (cut.share * cut.count + self._refused) / count
        error = math.sqrt(share * (1 - share) / count)  # one sigma: assumed too low, it would look like a storm
        ordinary.set(share + error, max(LEAST_SURE, count))
        restored = None
        if self.confirmed is not None and share < MUCH_CHANCE:  # else the first lowering was also a mistake
            restored = cut.per_s if self.raised else self._before_chain
        self._cut = self.confirmed = None
        self._set_mark(at_s)
        self._set(restored, now_s, f"{share:.0%} are refused at any rate")
        self._rough, self._step, self.raised = False, STEP, True
        return True

    def restore(self, per_s: float | None, now_s: float, why: str) -> None:
        """Restores an earlier rate, because the rate did not cause the refusals."""
        self._cut = self.confirmed = None
        self._mark = None
        self._set(per_s, now_s, why)
        self._rough, self._step, self.raised = True, DOUBLED, True

    def slower_helped(self, per_s: float, now_s: float) -> None:
        """A lower rate ended refusals: what was accepted before is the limit."""
        self._mark = self._cut = None
        self._lower(BELOW_MEASURED * per_s, now_s, rough=False, why="slower on purpose, nothing was refused")

    def rise(self, now_s: float, share: float) -> bool:
        """Tries a higher rate when it is time, and returns True then; `share` is refused in ordinary times."""
        rate = self.per_s
        if rate is None:
            return False
        spacing = self._spacing
        if spacing is not None and spacing.is_searching:
            if not spacing.is_tried(rate):
                return False
            spacing.prove()
            self.raised = True
            self._set(spacing.higher(rate), now_s, "nothing refused since")
            self._rough = spacing.is_searching
            self._raised_s, self._raised_total = now_s, self._rate.taken
            spacing.restart(now_s)
            self._end_spacing(spacing)
            return True
        requests_per_s = rate * self._rate.requests / self._delivered.total if self._delivered.total else rate
        if self._rough:
            every_s = min(MAX_EVERY_S, max(ROUGH_EVERY_S, ROUGH_EVERY / requests_per_s))
        else:
            every_s = min(MAX_EVERY_S, max(EVERY_S, EVERY / requests_per_s))
        if now_s - self._raised_s < every_s:
            return False
        total = self._rate.taken
        used = total - self._raised_total >= USED * (now_s - self._raised_s) * rate
        self._raised_s, self._raised_total = now_s, total
        self._rest -= every_s * requests_per_s
        if not used:
            return False
        if self._known.is_back:
            self._known.confirm()
        elif self._known.doubted is not None:
            self.raised = True
            self._set(max(rate, BELOW_MEASURED * self._known.go_back()), now_s, "back to what was measured before")
            return True
        elif not self.raised and self._rest > 0:
            return False
        if not self.raised:
            self._climbs_from = self._counted
            self._known.climb(now_s, self._delivered.total, self._server_level(now_s))
            rate /= 1 - min(0.5, share)  # the measured rate counts accepted requests; more must be sent
        elif not self._rough:
            self.confirmed = rate * 60
        self.raised = True
        if spacing is not None:
            spacing.prove()
            spacing.restart(now_s)
        self._set(rate * (1 + self._step), now_s, "nothing refused since")
        if self._step < DOUBLED:
            self._step = min(MAX_STEP, (ROUGH_FASTER if self._rough else FASTER) * self._step)
        return True

    def share_below(self, ordinary: float) -> tuple[float, int] | None:
        """The refused share since the bucket was last empty, and of how many; None unless clearly below `ordinary`."""
        if self._counted * ordinary < LEAST_COUNT or self._share > ordinary / ALIKE:
            return None
        return self._share, self._counted

    def drop(self, now_s: float, why: str) -> None:
        """Drops the learned rate."""
        if self._rate.learned is not None:
            self._set(None, now_s, why)

    def reopened(self, now_s: float) -> None:
        """The pause is over. What the server's bucket refilled meanwhile is left as a margin."""
        if self._spacing is not None:
            self._rate.stand_at(min(self._rate.level(now_s), self._amount), now_s)
            return
        self._raised_s, self._raised_total = now_s, self._rate.taken
        self._rate.stand_at(0.0, now_s)

    def forget(self) -> None:
        """Drops everything learned, because the limit is now known from a better source."""
        self.confirmed = self._cut = self._mark = None
        self._known = KnownLimit()
        self._rough = self._paused = self.raised = False
        self._spacing = None
        self._rate.limit_burst(math.inf)

    @property
    def _known_per_s(self) -> float | None:
        """The configured or stated rate."""
        return None if self._rate.per_minute is None else self._rate.per_minute / 60

    @property
    def _share(self) -> float:
        return self._refused / max(1, self._counted)

    def _server_level(self, at_s: float) -> float:
        """What the server's bucket holds, by the measured limit. It is full at what it gave before the first refusal,
        less what was refilled meanwhile.
        """
        limit = self._known.per_s
        if limit is None or self._mark is None:
            return 0.0
        level = limit * (at_s - self._mark[0]) - self._taken_since()
        full = math.inf if self._burst is None else self._burst[1] - limit * self._burst[0]
        return max(0.0, min(level, full))

    def _taken_since(self) -> float:
        return self._delivered.total - (0.0 if self._mark is None else self._mark[1])

    def _measured(self, at_s: float) -> float | None:
        """Accepted ÷ time since the bucket was last empty; None if that says nothing yet."""
        if self._mark is None:
            return None
        span_s, taken = at_s - self._mark[0], self._taken_since()
        if span_s < LEAST_SPAN_S or taken < LEAST_TIMES * self._amount:
            return None
        at_least = BURST_OFF * (self.lately(at_s) or 0.0) if span_s > WINDOW_S else 0.0
        return max(taken / span_s, at_least)

    def shown(self, at_s: float) -> float | None:
        """The measured rate, corrected for a bucket that refilled in a pause and was not all used."""
        rate = self._measured(at_s)
        if rate is None or not self._paused or self.per_s is None:
            return rate
        return max(rate, LEAST_AFTER_PAUSE * self.per_s)

    def excess(self, at_s: float) -> float:
        """The share that is refused from now on if the limit is what was measured; 0 while that says nothing."""
        rate, measured = self.per_s, self.shown(at_s)
        return 0.0 if rate is None or measured is None else max(0.0, 1 - measured / rate)

    def _set_mark(self, at_s: float) -> None:
        if self._burst is None and self._mark is None and self._delivered.first_s is not None:
            self._burst = at_s - self._delivered.first_s, self._delivered.total
        self._mark = at_s, self._delivered.total
        self._counted = self._refused = 0

    def _schedule_next_climb(self, measured: float, ordinary: float) -> None:
        """If this climb met the limit that was known, the next one has to wait."""
        known = self._known.per_s
        if known is not None and abs(measured - known) <= MET * known:
            refused = self._refused - ordinary * self._counted
            self._rest = min(MOST_REST, refused / WORTH - (self._counted - self._climbs_from))

    def _remember(self, before: float | None) -> None:
        """Keeps the rate from before a series of lowerings without a rise between them."""
        if before is None or self.raised:
            self._before_chain = before

    def _lower(self, per_s: float, now_s: float, *, rough: bool, why: str) -> None:
        before = self.per_s
        if before is not None and self._spacing is None:
            per_s = min(per_s, BELOW_MEASURED * before)
        self._rough, self.raised = rough, False
        self._step = ROUGH_STEP if rough else STEP
        self._raised_s, self._raised_total = now_s, self._rate.taken
        if self._spacing is not None:
            self._spacing.restart(now_s)
        self._set(max(per_s, LEAST_PER_S), now_s, why)
        self._rate.stand_at(min(0.0, self._rate.level(now_s)), now_s)

    def _set(self, per_s: float | None, now_s: float, why: str) -> None:
        self._rate.learn(None if per_s is None else per_s * 60, now_s, why)
        if self._rate.learned is None:
            self.forget()
