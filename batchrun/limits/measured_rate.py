"""Measures a limit between two moments at which the server's bucket was empty. PURE.

While it is empty it accepts exactly what its limit refills. So accepted ÷ time between two such moments *is* the limit,
bursts and pauses included.
"""

import math

from batchrun.limits.throughput import LEAST_SPAN_S, WINDOW_S, Throughput

MOMENT_S = 0.005
"""Requests that are sent at once leave within a few milliseconds."""

LEAST_TIMES = 10
"""Over less than a second, or ten times the refused amount, one request more or less distorts the rate."""

FIRM_TIMES = 20
"""Below this the rate is rough, and tried upwards faster."""

BURST_OFF = 0.85
"""If the bucket was empty long ago, less than the limit may have been sent since: what was accepted in the last ten
seconds, less a burst, is a lower bound of the limit."""


class MeasuredRate:
    """What was accepted and refused since the bucket was last empty (`mark`). Amounts are requests or tokens.

    `delivered` is what was accepted since the start, `counted` and `refused` are attempts since the mark.
    """

    __slots__ = ("_burst", "_mark", "_refused_s", "amount", "at_first", "counted", "delivered", "is_mixed", "refused")

    def __init__(self) -> None:
        self.counted = self.refused = 0  # attempts
        self.amount = 1.0  # of the last refused attempt
        self.is_mixed = False  # of those sent first, one was accepted after a refusal
        self.delivered = Throughput()
        self.at_first = 0.0  # accepted before the first refusal, or in the first moment
        self._mark: tuple[float, float] | None = None
        self._refused_s: float | None = None  # when the first refused one was sent
        self._burst: tuple[float, float] | None = None  # the first refusal came after so long, and so much accepted

    def count(self, at_s: float, amount: float, *, refused: bool) -> None:
        """An attempt sent at `at_s` was accepted or refused. To be called in the order of sending."""
        self.counted += 1
        if refused:
            self.refused += 1
            self.amount = amount
            if self._refused_s is None:
                self._refused_s = at_s
            return
        self.delivered.add(at_s, amount)
        if self._refused_s is None or self.delivered.span_s(at_s) <= MOMENT_S:
            self.at_first += amount
            self.is_mixed |= self._refused_s is not None

    def accepted(self, at_s: float, amount: float, count: int) -> None:
        """As `count`, for several attempts that were accepted, the last of them sent at `at_s`."""
        self.counted += count
        self.delivered.add(at_s, amount)
        if self._refused_s is None:
            self.at_first += amount

    def correct(self, more: float) -> None:
        """An accepted attempt used this much more than its estimate."""
        self.delivered.total += more

    def mark(self, at_s: float) -> None:
        """The bucket was empty at `at_s`: the next measurement begins there."""
        if self._burst is None and self._mark is None and self.delivered.first_s is not None:
            self._burst = at_s - self.delivered.first_s, self.delivered.total
        self._mark = at_s, self.delivered.total
        self.counted = self.refused = 0

    def unmark(self) -> None:
        """No moment is known at which the bucket was empty."""
        self._mark = None

    @property
    def is_marked(self) -> bool:
        return self._mark is not None

    @property
    def share(self) -> float:
        """The refused share of attempts."""
        return self.refused / max(1, self.counted)

    @property
    def taken(self) -> float:
        """The amount accepted since the mark."""
        return self.delivered.total - (0.0 if self._mark is None else self._mark[1])

    @property
    def is_firm(self) -> bool:
        """True if enough was accepted since the mark for an exact rate."""
        return self.taken >= FIRM_TIMES * self.amount

    def refilled_per_s(self, at_s: float) -> float:
        """A lower bound of the limit: what was accepted beyond the first requests, since the first refusal. One of them
        may have been left in the bucket.
        """
        span_s = 0.0 if self._refused_s is None else at_s - self._refused_s
        return max(0.0, self.delivered.total - self.at_first - self.amount) / span_s if span_s else 0.0

    def refused_above(self, ordinary: float) -> float:
        """How many attempts were refused beyond the `ordinary` share."""
        return self.refused - ordinary * self.counted

    def at_least(self, at_s: float) -> float:
        """A lower bound of the limit; 0.0 in the first ten seconds."""
        return BURST_OFF * (self.delivered.lately(at_s) or 0.0) if self.delivered.span_s(at_s) >= WINDOW_S else 0.0

    def per_s(self, at_s: float) -> float | None:
        """Accepted ÷ time since the bucket was last empty; None if that says nothing yet."""
        if self._mark is None:
            return None
        span_s = at_s - self._mark[0]
        if span_s < LEAST_SPAN_S or self.taken < LEAST_TIMES * self.amount:
            return None
        return max(self.taken / span_s, self.at_least(at_s) if span_s > WINDOW_S else 0.0)

    def server_level(self, at_s: float, limit_per_s: float | None) -> float:
        """What the server's bucket holds, if `limit_per_s` is its limit.

        It holds at most what it gave before the first refusal, less what was refilled until then.
        """
        if limit_per_s is None or self._mark is None:
            return 0.0
        level = limit_per_s * (at_s - self._mark[0]) - self.taken
        full = math.inf if self._burst is None else self._burst[1] - limit_per_s * self._burst[0]
        return max(0.0, min(level, full))
