"""How fast one kind of thing may go: requests, tokens, input tokens, output tokens. PURE.

Three may say: the user (`told`), the server's headers (`stated`), and its refusals (`learned`, by `rate_search`). The
lowest holds. Without any of them there is no limit, and it costs next to nothing.

- What headers state holds at once where it is lower, and is approached by 5 % a second where it is higher: a limit that
  flickers does no harm, and a restored one is in use within a quarter of a minute.
- What the server says is left in its bucket (`remaining`) moves the level of ours: up where nobody else limits us, down
  where somebody else draws on the same limit.
"""

import math
from collections.abc import Callable

from batchrun.limits.admission import Limit
from batchrun.limits.rate_headers import Stated
from batchrun.limits.token_bucket import BURST_S, Bucket

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

ON_ITS_WAY_S = 0.05
"""How long a request may take to where the server counts it."""


class AdaptiveRate:
    """One limit's pace. `per_minute` is what holds now, None while nothing does."""

    __slots__ = (
        "_bucket",
        "_inherited",
        "_least",
        "_lowered_s",
        "_newer",
        "_older",
        "_on_change",
        "_raised_s",
        "_room",
        "learned",
        "limit",
        "per_minute",
        "requests",
        "stated",
        "stated_now",
        "taken",
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
        self.taken = 0.0  # requests or tokens that were sent, less what was given back
        self.requests = 0
        self._inherited = learned is not None
        self._least = 1.0 if limit is Limit.REQUESTS else 0.0  # a request goes whole; tokens of any number can wait
        self._on_change = on_change
        self._bucket: Bucket | None = None
        self._room: float | None = None
        self._lowered_s = self._raised_s = now_s
        self._older = self._newer = (now_s, 0.0)  # moments, and what had been sent by then
        self._hold("told" if told is not None else "learned by an earlier start", now_s)

    # ── what every request does ───────────────────────────────────────────────────────────────────────────────────

    def level(self, now_s: float) -> float:
        """What may be taken now without a debt; infinite where nothing holds."""
        return math.inf if self._bucket is None else self._bucket.level(now_s)

    def ready_in_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much may be taken; 0.0 when it may be taken now."""
        if self._bucket is None:
            return 0.0
        if now_s - self._raised_s >= RISE_EVERY_S:
            self._rise(now_s)
        return self._bucket.ready_in_s(amount, now_s)

    def take(self, amount: float, now_s: float) -> None:
        """So much is taken by a request."""
        if now_s - self._newer[0] >= ON_ITS_WAY_S:
            self._older, self._newer = self._newer, (now_s, self.taken)
        self.taken += amount
        self.requests += 1
        if self._bucket is not None:
            self._bucket.take(amount, now_s)

    def settle(self, actual_minus_estimate: float) -> None:
        """What was taken was so much more than was thought, or less if negative."""
        self.taken += actual_minus_estimate
        if self._bucket is not None:
            self._bucket.settle(actual_minus_estimate)

    # ── what changes it ───────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, per_minute: float, now_s: float) -> None:
        """The user tells another limit, which holds from now on. No burst comes with it."""
        self.told = per_minute
        self.learned = None  # somebody who knows has spoken; what is refused from now on is learned again
        self._hold("told", now_s)

    def learn(self, per_minute: float | None, now_s: float, why: str) -> None:
        """Refusals have taught another rate, or (None) that there is none. One beyond what is told or stated is no more
        than that.
        """
        others = _lowest(self.told, self.stated_now)
        if per_minute is not None and others is not None and per_minute >= others:
            per_minute = None
        self.learned = per_minute
        self._inherited = False
        self._hold(why, now_s)

    def stand_at(self, level: float, now_s: float) -> None:
        """So much may be taken now."""
        if self._bucket is not None:
            self._bucket.stand_at(level, now_s)

    def hear(self, said: Stated, now_s: float, *, sent_s: float, sent_total: float) -> None:
        """The server has stated its limit, answering a request sent at `sent_s`, when `taken` was `sent_total`."""
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
        uncounted = max(self._lately(now_s), self.taken - sent_total - refilled)
        at_least = said.remaining - uncounted - margin
        at_most = max(0.0, said.remaining + self._least - margin)
        level = self._bucket.level(now_s)
        if level < at_least and self.per_minute == self.stated:
            self._bucket.stand_at(at_least, now_s)
        elif level > at_most and sent_s >= self._lowered_s:  # once a round trip: older answers tell of the same
            self._lowered_s = now_s
            self._bucket.stand_at(at_most, now_s)

    def _state(self, per_minute: float, now_s: float) -> None:
        first = self.stated is None
        self.stated = per_minute
        if first or self.stated_now is None or per_minute < self.stated_now:
            self.stated_now = per_minute
            if first and self._inherited:
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
        """A second has passed, or more: towards what the server states."""
        if self.stated is not None and self.stated_now is not None and self.stated_now < self.stated:
            self._raised_s = now_s
            self.stated_now = min(self.stated, self.stated_now * RISE)
            self._hold("towards what the server states", now_s)

    def _lately(self, now_s: float) -> float:
        """What was sent so lately that the server may not have counted it."""
        return self.taken - (self._newer if now_s - self._newer[0] >= ON_ITS_WAY_S else self._older)[1]

    def _hold(self, why: str, now_s: float) -> None:
        """The lowest of what is told, stated and learned holds."""
        before, self.per_minute = self.per_minute, _lowest(self.told, self.stated_now, self.learned)
        if self.per_minute == before:
            return
        if self.per_minute is None:
            self._bucket = None
            self._on_change(self.limit, before, None, why)
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
