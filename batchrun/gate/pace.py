"""How fast one kind of thing may go: requests, tokens, input tokens, output tokens. PURE.

Three may say: the user (`told`), the server's headers (`stated`), and its refusals (`learned`). The lowest holds.
Without any of them there is no limit, and it costs next to nothing.

- What headers state holds at once where it is lower, and is approached by 5 % a second where it is higher: a limit that
  flickers does no harm, and a restored one is in use within a quarter of a minute.
- A refusal measures (`accepted`): a little less than that rate is kept, then probed upwards, by 1 %, 2 %, 4 % … as long
  as no refusal comes and what is allowed is used. The first one only bounds it, or was chance: then 5 %, 10 %, 20 % …
  every second, and the next start does not begin there.
- What the server says is left in its bucket (`remaining`) moves the level of ours: up where nobody else limits us, down
  where somebody else draws on the same limit.
"""

from collections.abc import Callable

from batchrun.gate.accepted import Accepted
from batchrun.gate.accounts import BURST_S, Bucket
from batchrun.gate.admission import Limit
from batchrun.gate.rate_headers import Stated

PaceChange = Callable[[Limit, float | None, float | None, str], None]
"""Called with the limit, its rate per minute before and after (None: no limit), and why."""

MAX_BURST_S = 2.0
"""The burst where a server's headers show that it is free: more would break a told limit within its first minute."""

MARGIN_S = 0.08
"""How much of its bucket the server is left with: what clocks, networks and estimates may be wrong by. Spending it
would gain a moment once, and cost refusals for good."""

RISE = 1.05
RISE_EVERY_S = 1.0
"""Towards a higher stated limit: doubled within 15 s."""

BELOW_ACCEPTED = 0.98
"""What is kept of a measured rate: refusals stop, and the server's bucket fills a little for the next probe."""

BELOW_BOUND = 0.7
"""What is kept of a rate that is only bounded from above, by a burst of unknown size; the next refusal measures."""

BELOW_PACE = 0.95
"""What is kept of a pace that was told or stated, and then refused: it can't be far too high."""

BELOW_UNMEASURED = 0.85
"""What is kept when refused again too soon to measure anything."""

ROUGH_PROBE = 0.05
PROBE = 0.01
PROBE_EVERY_S = 4.0
MAX_PROBE = 0.32
"""Upwards by 1, 2, 4 … 32 %: a limit that was doubled is in use within half a minute, and one that was not costs some
refusals every quarter of a minute."""

USED = 0.8
"""A pace is raised only while so much of it is used: else nothing would be learned from not being refused."""


class Pace:
    """One limit's pace. `per_minute` is what holds now, None while nothing does."""

    __slots__ = (
        "_accepted",
        "_bucket",
        "_least",
        "_lowered_s",
        "_on_change",
        "_probe",
        "_raised_s",
        "_raised_total",
        "_refused_s",
        "_room",
        "_rough",
        "learned",
        "limit",
        "per_minute",
        "stated",
        "stated_now",
        "told",
    )

    def __init__(
        self,
        limit: Limit,
        told: float | None,
        now_s: float,
        on_change: PaceChange,
        *,
        learned: float | None = None,
    ) -> None:
        """`learned` is what an earlier process had learned: where this one begins."""
        self.limit = limit
        self.told = told
        self.stated: float | None = None
        self.stated_now: float | None = None
        self.learned = learned
        self.per_minute: float | None = None
        self._least = 1.0 if limit is Limit.REQUESTS else 0.0  # a request goes whole; tokens of any number can wait
        self._on_change = on_change
        self._bucket: Bucket | None = None
        self._accepted = Accepted(now_s)
        self._room: float | None = None
        self._lowered_s = self._refused_s = self._raised_s = now_s
        self._raised_total = 0.0
        self._probe = PROBE
        self._rough = False
        self._hold("told" if told is not None else "learned by an earlier start", now_s)

    # ── what every request does ───────────────────────────────────────────────────────────────────────────────────

    @property
    def total(self) -> float:
        """What was sent so far and not refused."""
        return self._accepted.total

    @property
    def found(self) -> float | None:
        """The rate that holds although nobody has told it; None where none does, or what was told, or a rough bound."""
        found = _lowest(self.stated_now, None if self._rough else self.learned)
        return None if found is None or (self.told is not None and found >= self.told) else found

    def ready_in_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much may be taken; 0.0 when it may be taken now."""
        if self._bucket is None:
            return 0.0
        if now_s - self._raised_s >= RISE_EVERY_S:
            self._rise(now_s)
        return self._bucket.ready_in_s(amount, now_s)

    def take(self, amount: float, now_s: float) -> None:
        """So much is taken."""
        self._accepted.sent(amount, now_s)
        if self._bucket is not None:
            self._bucket.take(amount, now_s)

    def settle(self, actual_minus_estimate: float) -> None:
        """What was taken was so much more than was thought, or less if negative."""
        self._accepted.corrected(actual_minus_estimate)
        if self._bucket is not None:
            self._bucket.settle(actual_minus_estimate)

    # ── what changes it ───────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, per_minute: float, now_s: float) -> None:
        """The user tells another limit, which holds from now on. No burst comes with it."""
        self.told = per_minute
        self._hold("told", now_s)

    def hear(self, said: Stated, now_s: float, *, sent_s: float, sent_total: float) -> None:
        """The server has stated its limit, answering a request sent at `sent_s`, when `total` was `sent_total`."""
        if said.per_minute != self.stated:
            self._state(said.per_minute, now_s)
        if said.remaining is None or self._bucket is None or self.per_minute is None:
            return
        margin = MARGIN_S * said.per_minute / 60
        if said.remaining > 0 and said.reset_s is not None:
            self._make_room(min(said.remaining + said.reset_s * said.per_minute / 60, said.per_minute) - margin, now_s)
        # whether the headers were made when the request came in or when its answer left is unknown: at least so much
        # is there in either case, once what was sent since has been counted, and what is on its way
        refilled = (now_s - sent_s) * self.per_minute / 60
        uncounted = max(self._accepted.lately(now_s), self.total - sent_total - refilled)
        at_least = said.remaining - uncounted - margin
        at_most = max(0.0, said.remaining + self._least - margin)
        level = self._bucket.level(now_s)
        if level < at_least and self.per_minute == self.stated:
            self._bucket.stand_at(at_least, now_s)
        elif level > at_most and sent_s >= self._lowered_s:  # once a round trip: older answers tell of the same
            self._lowered_s = now_s
            self._bucket.stand_at(at_most, now_s)

    def refuse(self, amount: float, now_s: float, *, first: bool) -> None:
        """So much was refused, and given back: for the `first` time since the gate was open, or as a consequence."""
        self._accepted.refused(amount, now_s, first=first)
        if first:
            self._refused_s = now_s

    def reopen(self, now_s: float) -> None:
        """The gate opens again after a refusal: what was accepted up to it decides the pace."""
        measured = self._accepted.rate()
        if measured is None or not measured.firm:
            self._rough = True
            bound = None if measured is None else measured.per_minute * BELOW_BOUND
            if self.per_minute is not None:
                bound = self.per_minute * (BELOW_PACE if self.learned is None else BELOW_UNMEASURED)
            self.learned = bound
            why = "refused, for the first time in a while"
        else:
            self._rough = False
            self.learned = measured.per_minute * BELOW_ACCEPTED
            if self.per_minute is not None:
                self.learned = min(self.learned, self.per_minute * BELOW_ACCEPTED)
            why = f"refused; {measured.per_minute:.0f} a minute were accepted"
        self._probe = ROUGH_PROBE if self._rough else PROBE
        self._raised_s, self._raised_total = now_s, self.total
        self._hold(why, now_s)
        if self._bucket is not None and self.per_minute is not None:
            waited_s = now_s - self._refused_s
            self._bucket.stand_at(0.0 if self._rough else waited_s * self.per_minute / 60, now_s)

    def _state(self, per_minute: float, now_s: float) -> None:
        first = self.stated is None
        self.stated = per_minute
        if first or self.stated_now is None or per_minute < self.stated_now:
            self.stated_now = per_minute
            if first and not self._rough and self._accepted.never_refused:
                self.learned = None  # by an earlier start: the server knows better
            self._hold("stated by the server", now_s)

    def _make_room(self, room: float, now_s: float) -> None:
        """The bucket is as deep as the server's, within what we allow ourselves."""
        if self.per_minute is None or self._bucket is None:
            return
        capacity = max(self._least, min(room, MAX_BURST_S * self.per_minute / 60))
        if capacity > 0 and abs(capacity - self._bucket.capacity) > self._least + 0.01 * capacity:
            self._room = room
            self._bucket.change(self.per_minute, capacity, now_s)

    def _rise(self, now_s: float) -> None:
        """A second has passed, or more: towards what the server states, or beyond what it has refused."""
        if self.stated is not None and self.stated_now is not None and self.stated_now < self.stated:
            self._raised_s = now_s
            self.stated_now = min(self.stated, self.stated_now * RISE)
            self._hold("towards what the server states", now_s)
        elif self.learned is not None and now_s - self._raised_s >= (RISE_EVERY_S if self._rough else PROBE_EVERY_S):
            self._probe_upwards(now_s)

    def _probe_upwards(self, now_s: float) -> None:
        assert self.learned is not None
        allowed = (now_s - self._raised_s) * self.learned / 60
        used = self.total - self._raised_total >= USED * allowed
        self._raised_s, self._raised_total = now_s, self.total
        if not used:
            return
        self.learned *= 1 + self._probe
        self._probe = min(MAX_PROBE, 2 * self._probe)
        others = _lowest(self.told, self.stated_now)
        if others is not None and self.learned >= others:
            self.learned = None
        self._hold("nothing refused since", now_s)

    def _hold(self, why: str, now_s: float) -> None:
        """The lowest of what is told, stated and learned holds."""
        before, self.per_minute = self.per_minute, _lowest(self.told, self.stated_now, self.learned)
        if self.per_minute is None or self.per_minute == before:
            return
        burst_s = BURST_S if self._room is None else MAX_BURST_S
        capacity = self.per_minute / 60 * burst_s
        if self._room is not None:
            capacity = min(capacity, self._room)
        capacity = max(self._least, capacity)
        if self._bucket is None:
            self._bucket = Bucket(self.per_minute, now_s, least=self._least)
        self._bucket.change(self.per_minute, capacity, now_s)
        if before is not None or self.per_minute != self.told:
            self._on_change(self.limit, before, self.per_minute, why)


def _lowest(*rates: float | None) -> float | None:
    return min((rate for rate in rates if rate is not None), default=None)
