"""What the server has accepted, and at which rate: measured between its refusals. PURE.

At a refusal the server's bucket is empty. So between two refusals it accepted exactly what its limit gave, whatever
its burst is: that is its rate. Before the first refusal a burst of unknown size was spent, too, and what was accepted
bounds the rate from above only.
"""

from collections import deque

import msgspec

WINDOW_S = 10.0
"""How far back a rate is measured: long enough for a per cent, short enough to see a limit change."""

LEAST_SPAN_S = 1.0
LEAST_TIMES = 20
"""Over less than a second, or twenty times what was refused, one request more or less is too much of the rate."""

BURST_OFF = 0.85
"""What the window holds beside a burst of two seconds. A longer one makes the rate too high, but the next refusal soon
measures it; a rate too low would be kept for many seconds."""

ON_ITS_WAY_S = 0.05
"""How long a request may take to where the server counts it."""


class Measured(msgspec.Struct, frozen=True):
    """A rate per minute; `firm` when it was measured from refusal to refusal."""

    per_minute: float
    firm: bool


class _Refusal(msgspec.Struct):
    """When the account was empty, what had been accepted by then, and the amount that was refused."""

    at_s: float
    total: float
    amount: float


class Accepted:
    """Counts what was sent and not refused. `total` is in the unit of the limit: requests or tokens."""

    __slots__ = ("_begun", "_lately", "_marks", "_refusals", "total")

    def __init__(self, now_s: float) -> None:
        self.total = 0.0
        self._begun = False
        self._marks: deque[tuple[float, float]] = deque([(now_s, 0.0)], maxlen=int(WINDOW_S) + 1)
        self._lately = (now_s, 0.0), (now_s, 0.0)
        self._refusals: deque[_Refusal] = deque(maxlen=16)

    @property
    def never_refused(self) -> bool:
        """True while nothing was ever refused."""
        return not self._refusals

    def sent(self, amount: float, now_s: float) -> None:
        """So much went out, and counts as accepted until it is refused."""
        if not self._begun:  # the clock runs from the first request on
            self._begun = True
            self._marks[0] = (now_s, 0.0)
        elif now_s - self._marks[-1][0] >= 1.0:
            self._marks.append((now_s, self.total))
        if now_s - self._lately[1][0] >= ON_ITS_WAY_S:
            self._lately = self._lately[1], (now_s, self.total)
        self.total += amount

    def lately(self, now_s: float) -> float:
        """What was sent so lately that the server may not have counted it."""
        older, newer = self._lately
        return self.total - (newer if now_s - newer[0] >= ON_ITS_WAY_S else older)[1]

    def corrected(self, more: float) -> None:
        """What was sent was so much more than was thought."""
        self.total += more

    def refused(self, amount: float, now_s: float, *, first: bool) -> None:
        """So much of what was sent was refused, and `corrected` already: by the `first` refusal of an episode, which
        empties the account, or by one that follows from it.
        """
        if first:
            self._refusals.append(_Refusal(now_s, self.total, amount))
        elif self._refusals:
            self._refusals[-1].total -= amount

    def rate(self) -> Measured | None:
        """The rate up to the last refusal; None where nothing was accepted before it.

        Between two refusals less than the limit was accepted if less was sent. Where they are far apart, what was
        accepted lately bounds the rate from below, once a burst is taken off it.
        """
        if not self._refusals:
            return None
        *before, last = self._refusals
        begun_s, begun_total = self._marks[0]
        lately = (last.total - begun_total) / max(last.at_s - begun_s, LEAST_SPAN_S)
        for refusal in reversed(before):
            accepted, span_s = last.total - refusal.total, last.at_s - refusal.at_s
            if span_s >= LEAST_SPAN_S and accepted >= LEAST_TIMES * last.amount:
                at_least = lately * BURST_OFF if span_s > WINDOW_S else 0.0
                return Measured(max(accepted / span_s, at_least) * 60, firm=True)
        return Measured(lately * 60, firm=False) if lately > 0 else None
