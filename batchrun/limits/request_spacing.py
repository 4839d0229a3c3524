"""Finds the limit of a server that accepts evenly spaced requests only (nginx's `limit_req`, with a small `burst` or
none). PURE.

Its bucket holds a few requests at most and is soon full again, so that accepted ÷ time says little: slightly above the
limit of a bucket of one, every second request is refused. But a rate at which nothing is refused, while several times
what the bucket holds is sent, *is* no higher than the limit.
Rates are tried upwards in large steps, then halfway (in proportion) between the highest accepted and lowest refused.
"""

import math

from batchrun.limits.evidence import RefusedShare

FIRST_PER_S = 1.0
"""The search begins at one request a second: few limits are lower."""

TIMES = 4.0
"""Until too much is refused, each next rate is four times as high. The next request shows whether it is too high, so a
limit of 50 a second is found within three seconds of the first refusal."""

SMALL_TIMES = 1.6
"""The same where the bucket holds a few requests: each one too many is refused as well, until the rate falls."""

NEAR = 0.9
"""The search ends with the accepted and the refused rate this near to each other; small steps continue from there."""

REFUSED_TIMES = 3
"""No higher rate is tried while more than a quarter is refused."""

USED = 0.8
"""A rate was tried only if this share of it was used."""

CONTRADICTED, MOST_CONTRADICTIONS = 2.0, 3
"""A bucket with an accepted rate has a request again after 1 ÷ rate. If three are refused although the last accepted
one is twice as long ago, no bucket refuses them (or the limit fell below half, and is searched again)."""


class RequestSpacing:
    """`accepted_per_s` is the highest rate without a refusal; `is_searching` until the limit is known to a tenth.

    Rates are tried one after another. A try lasts from the first to the last request accepted at its rate.
    """

    __slots__ = (
        "_accepted",
        "_contradictions",
        "_from_s",
        "_highest_per_s",
        "_refused",
        "_refused_per_s",
        "_saved",
        "_since_s",
        "_until_s",
        "accepted_per_s",
        "is_searching",
        "share",
    )

    def __init__(self, holds: float) -> None:
        """`holds` is how many requests the server's bucket accepts at once."""
        self._saved = holds - 1  # what a full bucket accepts beyond the rate
        self.is_searching = True
        self.share = RefusedShare()
        self.accepted_per_s = self._highest_per_s = 0.0
        self._refused_per_s = math.inf
        self._contradictions = 0
        self._until_s: float | None = None  # when the last accepted request was sent
        self.restart(0.0)

    def restart(self, now_s: float) -> None:
        """The rate has changed, or what was sent so far does not count."""
        self._since_s = now_s
        self._from_s = self._until_s
        self._accepted = self._refused = 0

    def count(self, at_s: float, *, refused: bool) -> None:
        """A request sent at `at_s` was accepted or refused. To be called in the order of sending."""
        self.share.add(refused, 1)
        if refused:
            self._refused += at_s >= self._since_s
            if self._until_s is not None and (at_s - self._until_s) * self._highest_per_s >= CONTRADICTED:
                self._contradictions += 1
            return
        self._until_s = at_s
        if self._from_s is None or at_s < self._since_s:
            self._from_s = at_s
        else:
            self._accepted += 1

    @property
    def is_found(self) -> bool:
        """True if the limit is known, and the bucket holds enough to measure it between two moments without any."""
        return not self.is_searching and self._saved >= 1

    @property
    def is_contradicted(self) -> bool:
        """True if requests were refused long after an empty bucket had one again."""
        return self._contradictions >= MOST_CONTRADICTIONS

    def is_tried(self, per_s: float) -> bool:
        """True if enough was accepted at this rate to try a higher one."""
        if self._accepted < 1 + REFUSED_TIMES * self._refused + self._saved:
            return False
        if self._accepted < USED * per_s * self._span_s:  # a pause, or a longer gap of the rate before
            self.restart(self._since_s)
            return False
        return True

    def prove(self) -> None:
        """This try is over. If nothing was refused in it, the limit is at least its rate."""
        if self._accepted > self._saved and not self._refused:
            self.accepted_per_s = max(self.accepted_per_s, (self._accepted - self._saved) / self._span_s)
            self._highest_per_s = max(self._highest_per_s, self.accepted_per_s)

    def higher(self, per_s: float) -> float:
        """The next rate to try."""
        if self._refused_per_s == math.inf:
            return (SMALL_TIMES if self._saved else TIMES) * per_s
        higher = math.sqrt(self._refused_per_s * per_s)
        self.is_searching = higher < NEAR * self._refused_per_s
        return higher

    def lower(self, refused_per_s: float) -> float | None:
        """The rate to fall back to when this one is refused too often; None as long as nothing was accepted."""
        if refused_per_s <= self.accepted_per_s:
            self.accepted_per_s = 0.0  # the limit has fallen, or it was luck
        if not self.accepted_per_s and not self._accepted:
            return None
        accepted_per_s = self.accepted_per_s or refused_per_s / 2
        self._refused_per_s = refused_per_s
        if self.is_searching and accepted_per_s < NEAR * refused_per_s:
            accepted_per_s = math.sqrt(accepted_per_s * refused_per_s)
        self.is_searching = accepted_per_s < NEAR * refused_per_s
        return accepted_per_s

    @property
    def _span_s(self) -> float:
        """How long this try has lasted."""
        assert self._from_s is not None
        assert self._until_s is not None
        return self._until_s - self._from_s
