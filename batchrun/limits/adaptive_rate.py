"""One adaptive rate: of requests, tokens, input or output tokens per minute. PURE.

The lowest of three holds: the one `configured` by the user, the one `stated` in the server's headers, and the one
`learned` from refusals (by `rate_search`). Without any there is no limit, at almost no cost.

- A lower stated limit holds at once; a higher one is approached by 5 % a second, so that a flickering header does no
  harm and a restored limit is in use within 15 s.
- The server's `remaining` adjusts the level of our bucket: up if nothing else limits us, down if another client draws
  on the same limit.
"""

import math
from collections.abc import Callable

from batchrun.limits.admission import Limit
from batchrun.limits.rate_headers import StatedLimit
from batchrun.limits.token_bucket import BURST_S, Bucket

RateChange = Callable[[Limit, float | None, float | None, str], None]
"""Called with the limit, its rate per minute before and after (None: no limit), and why."""

MAX_BURST_S = 2.0
"""The largest burst, if the server's headers allow it: more would exceed a configured limit in its first minute."""

MARGIN_S = 0.08
"""How much of its bucket the server is left with, for errors of clocks, networks and estimates: using it would gain a
moment once, and cost refusals for good."""

RISE = 1.05
RISE_EVERY_S = 1.0
"""Towards a higher stated limit: doubled within 15 s."""

IN_TRANSIT_S = 0.05
"""How long a request may take to reach the server's counter."""


class AdaptiveRate:
    """One limit's rate. `per_minute` is the limit in force, None if there is none.

    `stated` is what the server's headers said last, `stated_now` what of it is in force so far.
    """

    __slots__ = (
        "_bucket",
        "_inherited",
        "_least",
        "_lowered_s",
        "_newer",
        "_note_from_s",
        "_older",
        "_on_change",
        "_raised_s",
        "_room",
        "burst",
        "configured",
        "learned",
        "limit",
        "per_minute",
        "requests",
        "stated",
        "stated_now",
        "taken",
    )

    def __init__(
        self,
        limit: Limit,
        configured: float | None,
        now_s: float,
        on_change: RateChange,
        *,
        learned: float | None = None,
    ) -> None:
        """`learned` comes from an earlier process."""
        self.limit = limit
        self.configured = configured
        self.stated: float | None = None
        self.stated_now: float | None = None
        self.learned = learned
        self.per_minute: float | None = None
        self.taken = 0.0  # requests or tokens sent, less refunds
        self.requests = 0
        self._inherited = learned is not None
        self._least = 1.0 if limit is Limit.REQUESTS else 0.0  # a bucket of requests must hold a whole one
        self._on_change = on_change
        self._bucket: Bucket | None = None
        self._room: float | None = None
        self.burst = math.inf  # no more than this is sent at once, from the next change of the rate on
        self._lowered_s = self._raised_s = now_s
        self._older = self._newer = (now_s, 0.0)  # (moment, what had been taken by then)
        self._note_from_s = now_s + IN_TRANSIT_S
        self._apply_lowest("configured" if configured is not None else "learned by an earlier process", now_s)

    # ── on every request ───────────────────────────────────────────────────────────────────────────────────

    def level(self, now_s: float) -> float:
        """What may be taken now without a debt; infinite without a limit."""
        return math.inf if self._bucket is None else self._bucket.level(now_s)

    def ready_in_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0.0 if it may be taken now."""
        if self._bucket is None:
            return 0.0
        if now_s - self._raised_s >= RISE_EVERY_S:
            self._rise(now_s)
        return self._bucket.ready_in_s(amount, now_s)

    def take(self, amount: float, now_s: float) -> None:
        """Takes `amount` for one request."""
        if now_s >= self._note_from_s:
            self._older, self._newer = self._newer, (now_s, self.taken)
            self._note_from_s = now_s + IN_TRANSIT_S
        self.taken += amount
        self.requests += 1
        if self._bucket is not None:
            self._bucket.take(amount, now_s)

    def settle(self, actual_minus_estimate: float) -> None:
        """Corrects an earlier `take` to the actual amount."""
        self.taken += actual_minus_estimate
        if self._bucket is not None:
            self._bucket.settle(actual_minus_estimate)

    # ── changes of the limit ──────────────────────────────────────────────────────────────────────────────────────────

    def configure(self, per_minute: float, now_s: float) -> None:
        """The user sets another limit, in force from now on, without a burst."""
        self.configured = per_minute
        self.learned = None  # learned again from the next refusals
        self._apply_lowest("configured", now_s)

    def learn(self, per_minute: float | None, now_s: float, why: str) -> None:
        """Sets the rate learned from refusals; None: there is none. A rate at or above the configured and stated ones
        is dropped.
        """
        others = _lowest(self.configured, self.stated_now)
        if per_minute is not None and others is not None and per_minute >= others:
            per_minute = None
        self.learned = per_minute
        self._inherited = False
        self._apply_lowest(why, now_s)

    def stand_at(self, level: float, now_s: float) -> None:
        """Sets the bucket's level."""
        if self._bucket is not None:
            self._bucket.stand_at(level, now_s)

    def apply_headers(self, limit: StatedLimit, now_s: float, *, sent_s: float, sent_total: float) -> None:
        """Applies the limit stated in the response to a request sent at `sent_s`, when `taken` was `sent_total`."""
        if limit.per_minute != self.stated:
            self._set_stated(limit.per_minute, now_s)
        if limit.remaining is None or self._bucket is None or self.per_minute is None:
            return
        margin = MARGIN_S * limit.per_minute / 60
        if limit.remaining > 0 and limit.reset_s is not None:
            # the bucket becomes as deep as the server's, up to our own maximum
            depth = min(limit.remaining + limit.reset_s * limit.per_minute / 60, limit.per_minute) - margin
            capacity = max(self._least, min(depth, MAX_BURST_S * self.per_minute / 60))
            if capacity > 0 and abs(capacity - self._bucket.capacity) > self._least + 0.01 * capacity:
                self._room = depth
                self._bucket.change(self.per_minute, capacity, now_s)
        # the server may have written the headers when the request came in or when its answer left: at least this much
        # is left in either case, after what was sent since and what is in transit
        refilled = (now_s - sent_s) * self.per_minute / 60
        in_transit = self.taken - (self._newer if now_s - self._newer[0] >= IN_TRANSIT_S else self._older)[1]
        uncounted = max(in_transit, self.taken - sent_total - refilled)
        at_least = limit.remaining - uncounted - margin
        at_most = max(0.0, limit.remaining + self._least - margin)
        level = self._bucket.level(now_s)
        if level < at_least and self.per_minute == self.stated:
            self._bucket.stand_at(at_least, now_s)
        elif level > at_most and sent_s >= self._lowered_s:  # once per round trip: older answers report the same
            self._lowered_s = now_s
            self._bucket.stand_at(at_most, now_s)

    def _set_stated(self, per_minute: float, now_s: float) -> None:
        """A lower stated limit holds at once; `ready_in_s` approaches a higher one."""
        first = self.stated is None
        self.stated = per_minute
        if first or self.stated_now is None or per_minute < self.stated_now:
            self.stated_now = per_minute
            if first and self._inherited:
                self.learned = None  # by an earlier process: the server knows better
            self._apply_lowest("stated by the server", now_s)

    def _rise(self, now_s: float) -> None:
        """Approaches a higher stated limit by one step."""
        if self.stated is not None and self.stated_now is not None and self.stated_now < self.stated:
            self._raised_s = now_s
            self.stated_now = min(self.stated, self.stated_now * RISE)
            self._apply_lowest("towards what the server states", now_s)

    def _apply_lowest(self, why: str, now_s: float) -> None:
        """Puts the lowest of the three rates in force."""
        before, self.per_minute = self.per_minute, _lowest(self.configured, self.stated_now, self.learned)
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
        capacity = max(self._least, min(capacity, self.burst))
        if self._bucket is None:
            self._bucket = Bucket(self.per_minute, now_s, least=self._least)
        self._bucket.change(self.per_minute, capacity, now_s)
        if before is not None or self.per_minute != self.configured:
            self._on_change(self.limit, before, self.per_minute, why)


def _lowest(*rates: float | None) -> float | None:
    return min((rate for rate in rates if rate is not None), default=None)
